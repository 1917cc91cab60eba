"""What plain OpenAI load generators send, to the letter, and what they read of the answers.

Recorded from `vllm bench serve` 0.32 (backends openai and openai-chat) and guidellm 0.8.1 (both request formats), with
shorter prompts.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.fakes import MAX_MODEL_LEN, FakeEngine
from tests.server.support import Client, chunks_of, client_for, settings

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

VLLM_HEADERS = {
    "accept": "*/*",
    "accept-encoding": "gzip, deflate",
    "content-type": "application/json",
    "user-agent": "Python/3.11 aiohttp/3.14.5",
    "x-request-id": "bench-650e6065-0",
}
GUIDELLM_HEADERS = {
    "accept": "*/*",
    "accept-encoding": "gzip, deflate",
    "connection": "keep-alive",
    "content-type": "application/json",
    "user-agent": "python-httpx/0.28.1",
}

VLLM = {
    "completions": (
        COMPLETIONS,
        '{"model": "m", "prompt": " Infrared Treating", "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": null, '
        '"stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}',
    ),
    "completions, sampled": (
        COMPLETIONS,
        '{"model": "m", "prompt": " Infrared Treating", "repetition_penalty": 1.1, "max_tokens": 4, "logprobs": null, '
        '"stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true, "top_p": 0.9, "top_k": 5, '
        '"min_p": 0.05, "temperature": 0.0, "frequency_penalty": 0.1, "presence_penalty": 0.1}',
    ),
    "chat": (
        CHAT,
        '{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": " Infrared Treating"}]}], '
        '"max_completion_tokens": 4, "stream": true, "stream_options": {"include_usage": true}, "ignore_eos": true}',
    ),
}
GUIDELLM = {
    "completions": (
        COMPLETIONS,
        '{"model":"m","stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true},'
        '"max_tokens":4,"ignore_eos":true,"prompt":"1 0 m0 Hard pass"}',
    ),
    "chat": (
        CHAT,
        '{"model":"m","stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true},'
        '"max_completion_tokens":4,"ignore_eos":true,"messages":[{"role":"user","content":'
        '[{"type":"text","text":"1 0 m0 Hard pass"}]}]}',
    ),
}


def texts(chunks: list[dict[str, Any]]) -> list[str | None]:
    """The text of each chunk that has a choice, as both tools find it."""
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return [choice["delta"].get("content") if "delta" in choice else choice["text"] for choice in choices]


@pytest.mark.parametrize("name", VLLM)
async def test_vllm_bench_serve(client: Client, engine: FakeEngine, name: str) -> None:
    path, body = VLLM[name]
    response = await client.post(path, content=body, headers=VLLM_HEADERS)
    assert response.status_code == 200, response.text
    assert "x-seraph-ignored" not in response.headers
    assert response.headers["x-request-id"] == "bench-650e6065-0"
    chunks = chunks_of(response.text)
    assert "".join(text or "" for text in texts(chunks)) == "Hell"
    # Usage is looked for in a chunk without choices only.
    (usage,) = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    assert (usage["completion_tokens"], usage["prompt_tokens"]) == (4, len(engine.requests[0].prompt_token_ids))
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.ignore_eos) == (4, True)
    if name == "completions, sampled":
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 5, 0.9, 0.05)
        penalties = sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        assert penalties == (1.1, 0.1, 0.1)


@pytest.mark.parametrize("name", GUIDELLM)
async def test_guidellm(client: Client, engine: FakeEngine, name: str) -> None:
    path, body = GUIDELLM[name]
    response = await client.post(path, content=body, headers=GUIDELLM_HEADERS)
    assert response.status_code == 200, response.text
    assert "x-seraph-ignored" not in response.headers
    chunks = chunks_of(response.text)
    assert "".join(text or "" for text in texts(chunks)) == "Hell"
    # It takes the usage of the last chunk that has any, and every chunk has.
    assert all(chunk["usage"] is not None for chunk in chunks)
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 4)
    assert engine.requests[0].sampling.ignore_eos


async def test_what_they_ask_before_they_start(client: Client) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/metrics")).status_code == 200
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["root"]) == ("m", "m")


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("/srv/secret/models/tiny.gguf", "tiny.gguf"),
        ("../models/Llama-3/", "Llama-3"),
        ("hf:org/name:file.gguf", "hf:org/name:file.gguf"),
        ("pypi:dist==1.0/a/b.gguf", "pypi:dist==1.0/a/b.gguf"),
    ],
)
async def test_the_root_of_a_model_names_no_folder(source: str, root: str) -> None:
    async with client_for(FakeEngine(), settings(model=(source,), served_model_name=("a", "b"))) as client:
        models = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in models] == [("a", root, None), ("b", root, None)]


async def test_prompts_are_aligned_to_the_servers_tokenizer(client: Client) -> None:
    """What `vllm bench serve` does with its random prompts: cut their tokens, and take the text of the rest."""
    asked = '{"model": "m", "prompt": " Infrared Treating", "add_special_tokens": false}'
    tokenized = (await client.post("/tokenize", content=asked, headers=VLLM_HEADERS)).json()
    assert tokenized["tokens"] == [ord(char) for char in " Infrared Treating"]
    assert (tokenized["count"], tokenized["max_model_len"]) == (18, MAX_MODEL_LEN)
    cut = json.dumps({"model": "m", "tokens": tokenized["tokens"][:9]})
    answer = await client.post("/detokenize", content=cut, headers=VLLM_HEADERS)
    assert answer.json() == {"prompt": " Infrared"}
