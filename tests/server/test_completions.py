"""POST /v1/completions: prompts of every shape, echo, streams."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import FinishReason
from tests.server.fakes import BOS, FakeEngine, say
from tests.server.support import Client, chunks_of, client_for, text_of

PATH = "/v1/completions"


async def test_a_whole_answer(client: Client) -> None:
    answer = (await client.post(PATH, json={"model": "m", "prompt": "Hi", "max_tokens": 20})).json()
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello, world", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["a", "b"], [[BOS, 97], [BOS, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_prompts_of_every_shape(
    client: Client, engine: FakeEngine, prompt: Any, token_ids: list[list[int]]
) -> None:
    response = await client.post(PATH, json={"model": "m", "prompt": prompt})
    assert response.status_code == 200, response.text
    assert [request.prompt_token_ids for request in engine.requests] == token_ids
    assert response.json()["usage"]["prompt_tokens"] == sum(map(len, token_ids))


async def test_special_tokens_can_be_left_out(client: Client, engine: FakeEngine) -> None:
    await client.post(PATH, json={"model": "m", "prompt": "ab", "add_special_tokens": False})
    assert engine.requests[-1].prompt_token_ids == [97, 98]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [["a", "b"], [[97], [98]]])
async def test_indices_go_prompt_by_prompt_and_echo_shows_each(stream: bool, prompt: Any) -> None:
    engine = FakeEngine(lambda r: say(r, f"{chr(r.prompt_token_ids[-1])}{r.choice_index}"))
    async with client_for(engine) as client:
        body = {"model": "m", "prompt": prompt, "n": 2, "echo": True, "stream": stream}
        response = await client.post(PATH, json=body)
    if stream:
        texts = text_of(chunks_of(response.text))
    else:
        texts = {choice["index"]: choice["text"] for choice in response.json()["choices"]}
    assert texts == {0: "aa0", 1: "aa1", 2: "bb0", 3: "bb1"}
    assert [r.choice_index for r in engine.requests] == [0, 1, 0, 1]
    assert len({r.group_id for r in engine.requests}) == 2


async def test_a_streamed_answer(client: Client) -> None:
    body = {"model": "m", "prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3}
    chunks = chunks_of((await client.post(PATH, json=body)).text)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert text_of(chunks) == {0: "Hel"}
    assert chunks[-2]["choices"][0]["finish_reason"] == FinishReason.LENGTH.value
    assert chunks[-1]["usage"]["completion_tokens"] == 3
