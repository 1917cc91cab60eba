"""POST /v1/chat/completions over a scripted engine: whole, streamed, and the two alike."""

from __future__ import annotations

from tests.server.support import Client, chat, chunks_of, text_of


async def test_a_whole_answer(client: Client) -> None:
    response = await client.post("/v1/chat/completions", json=chat("Hi"))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    # 12 characters and the end-of-turn token.
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 13,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_streamed_answer_equals_the_whole_one(client: Client) -> None:
    response = await client.post("/v1/chat/completions", json=chat("Hi", stream=True))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = chunks_of(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert text_of(chunks) == {0: "Hello, world"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)
    assert response.text.endswith("data: [DONE]\n\n")
