"""Bad input: a status, an OpenAI error body that says what was wrong, and no work for the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.fakes import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine
from tests.server.support import Client, chat, client_for, settings

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def completion(prompt: Any = "a", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, **fields}


def message(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "Hi", **fields}]}


BODIES: list[tuple[str, dict[str, Any], str, str]] = [
    # path, body, param of the error, a part of its message
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}]}, "model", "model is missing"),
    (CHAT, {"model": "m"}, "messages", "messages is missing"),
    (CHAT, {"model": "m", "messages": []}, "messages", "at least 1 item"),
    (CHAT, {"model": "m", "messages": None}, "messages", "got null"),
    (CHAT, {"model": "m", "messages": "Hi"}, "messages", "got text 'Hi'"),
    (CHAT, {"model": 3, "messages": [{"role": "user", "content": "Hi"}]}, "model", "got 3"),
    (CHAT, message(role="wizard"), "messages.0.role", "got text 'wizard'"),
    (CHAT, message(role="function"), "messages.0.role", "give it the role 'tool'"),
    (CHAT, message(content=None), "messages.0.content", "is missing"),
    (CHAT, message(content=7), "messages.0.content", "must be text or a list of parts, got 7"),
    (CHAT, message(content=[{"type": "text"}]), "messages.0.content.0.text", "is missing"),
    (CHAT, message(content=["Hi"]), "messages.0.content.0", "got text 'Hi'"),
    (
        CHAT,
        message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]),
        "messages.0.content.0.type",
        "'image_url'",
    ),
    (CHAT, message(content=[{"type": "input_audio"}]), "messages.0.content.0.type", "'input_audio'"),
    (CHAT, message(content=[{"type": "file"}]), "messages.0.content.0.type", "'file'"),
    (CHAT, message(tool_calls=[{"id": "x"}]), "messages.0.tool_calls.0.function", "is missing"),
    (CHAT, message(function_call={"name": "x"}), "messages.0.function_call", "not supported"),
    (CHAT, chat(temperature=-1), "temperature", "between 0 and 2, got -1.0"),
    (CHAT, chat(temperature=2.5), "temperature", "between 0 and 2"),
    (CHAT, chat(temperature="hot"), "temperature", "got text 'hot'"),
    (CHAT, chat(temperature=True), "temperature", "got true"),
    (CHAT, chat(top_p=0), "top_p", "above 0"),
    (CHAT, chat(top_p=1.5), "top_p", "at most 1"),
    (CHAT, chat(top_k=-2), "top_k", "-1 or 0"),
    (CHAT, chat(top_k=1.5), "top_k", "got 1.5"),
    (CHAT, chat(min_p=2), "min_p", "between 0 and 1"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty", "above 0"),
    (CHAT, chat(presence_penalty=3), "presence_penalty", "between -2 and 2"),
    (CHAT, chat(frequency_penalty=-3), "frequency_penalty", "between -2 and 2"),
    (CHAT, chat(n=0), "n", "got 0"),
    (CHAT, chat(n=10_000), "n", "got 10000"),
    (CHAT, chat(n="2"), "n", "got text '2'"),
    (CHAT, chat(max_tokens=0), "max_tokens", "got 0"),
    (CHAT, chat(max_completion_tokens=-1), "max_completion_tokens", "got -1"),
    (CHAT, chat(min_tokens=-1), "min_tokens", "got -1"),
    (CHAT, chat(min_tokens=5, max_tokens=4), "min_tokens", "max_tokens (4)"),
    (CHAT, chat(min_tokens=MAX_MODEL_LEN), "min_tokens", "at most"),
    (CHAT, chat(seed=1.5), "seed", "got 1.5"),
    (CHAT, chat(stop=[1]), "stop.0", "got 1"),
    (CHAT, chat(stop=["a"] * 17), "stop", "got a list of 17"),
    (CHAT, chat(stop="x" * 2000), "stop.0", "1024"),
    (CHAT, chat(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids", f"0 to {VOCAB_SIZE - 1}"),
    (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids", "token id -1"),
    (CHAT, chat(stop_token_ids=[10**30]), "stop_token_ids", "vocabulary"),
    (CHAT, chat(logit_bias={str(VOCAB_SIZE): 1}), "logit_bias", f"token id {VOCAB_SIZE}"),
    (CHAT, chat(logit_bias={"-1": 1}), "logit_bias.-1", "integer"),
    (CHAT, chat(logit_bias={"a": 1}), "logit_bias.a", "integer"),
    (CHAT, chat(logit_bias={"1": 101}), "logit_bias", "between -100 and 100"),
    (CHAT, chat(logit_bias={"1": "much"}), "logit_bias.1", "got text 'much'"),
    (CHAT, chat(logit_bias=[1]), "logit_bias", "got a list of 1"),
    (CHAT, chat(logit_bias={str(i): 0 for i in range(1025)}), "logit_bias", "at most 1024 items"),
    (CHAT, chat(stop_token_ids=[1] * 129), "stop_token_ids", "got a list of 129"),
    (CHAT, chat(ignore_eos="yes"), "ignore_eos", "got text 'yes'"),
    (CHAT, chat(stream="yes"), "stream", "got text 'yes'"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream", "stream must be true"),
    (CHAT, chat(stream=True, stream_options=[]), "stream_options", "got a list"),
    (CHAT, chat(priority=1 << 40), "priority", str(1 << 40)),
    (CHAT, chat(cache_salt=""), "cache_salt", "at least 1 character"),
    (COMPLETIONS, {"model": "m"}, "prompt", "prompt is missing"),
    (COMPLETIONS, completion(None), "prompt", "must be a text, a list of texts"),
    (COMPLETIONS, completion(7), "prompt", "got 7"),
    (COMPLETIONS, completion([]), "prompt", "must not be empty"),
    (COMPLETIONS, completion([[]]), "prompt", "no tokens"),
    (COMPLETIONS, completion("", add_special_tokens=False), "prompt", "must not be empty"),
    (COMPLETIONS, completion([1, "a"]), "prompt", "got a list of 2"),
    (COMPLETIONS, completion([True]), "prompt", "got a list of 1"),
    (COMPLETIONS, completion([VOCAB_SIZE]), "prompt", f"token id {VOCAB_SIZE}"),
    (COMPLETIONS, completion([[1], [-5]]), "prompt", "token id -5"),
    (COMPLETIONS, completion(["a"] * 65, n=2), "prompt", "at most 128, got 130"),
    (COMPLETIONS, completion(logprobs=21), "logprobs", "got 21"),
    (COMPLETIONS, completion(suffix="x"), "suffix", "not supported"),
    (COMPLETIONS, completion(best_of=2), "best_of", "not supported"),
]


@pytest.mark.parametrize(("path", "body", "param", "said"), BODIES, ids=lambda value: str(value)[:60])
async def test_wrong_bodies(
    client: Client, engine: FakeEngine, path: str, body: dict[str, Any], param: str, said: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"model": "m"',
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\udc00 tail"}]}',
        b"[" * 100_000,
        b'{"model": ' + b'{"a":' * 100_000,
        b'{"model": "m"} trailing',
    ],
    ids=lambda raw: repr(raw[:30]),
)
async def test_malformed_json(client: Client, engine: FakeEngine, raw: bytes) -> None:
    response = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_json"
    assert engine.requests == []


async def test_deep_nesting_that_still_parses(client: Client) -> None:
    raw = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}], "odd": ' + b"[" * 900 + b"]" * 900 + b"}"
    response = await client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert response.headers["x-seraph-ignored"] == "odd"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_other_content_types(client: Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await client.post(CHAT, content=b"{}", headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


async def test_unknown_model(client: Client) -> None:
    for response in (
        await client.post(CHAT, json={**chat(), "model": "gpt-4o"}),
        await client.post(COMPLETIONS, json={"model": "gpt-4o", "prompt": "a"}),
        await client.get("/v1/models/org/gpt-4o"),
    ):
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "gpt-4o" in error["message"] and "this server has m" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(CHAT, chat("x" * 100), "messages"), (COMPLETIONS, completion("x" * (MAX_MODEL_LEN - 1)), "prompt")],
)
async def test_a_prompt_over_the_context(client: Client, path: str, body: dict[str, Any], param: str) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == param
    assert error["message"].startswith("This model's maximum context length is")


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/chat/completions/", "/v1/audio/speech", "/docs/", "/docs/favicon.png"]
)
async def test_unknown_paths(client: Client, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_wrong_methods(client: Client) -> None:
    response = await client.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"


async def test_a_body_over_the_limit(engine: FakeEngine) -> None:
    async def chunks() -> Any:
        for _ in range(10):
            yield b"x" * 1000

    async with client_for(engine, settings(max_body_bytes=5000)) as client:
        headers = {"content-type": "application/json"}
        for response in (
            await client.post(CHAT, content=b"x" * 5001, headers=headers),
            await client.post(CHAT, content=chunks(), headers=headers),  # no content-length
        ):
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
            assert "5000 bytes" in response.json()["error"]["message"]


async def test_what_nobody_foresaw_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(lambda request: [ZeroDivisionError("secret detail")])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(), headers={"x-request-id": "abc"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["code"] == "internal_error"
    assert "secret" not in response.text and "Traceback" not in response.text
    assert "abc" in error["message"]
    assert "secret detail" in caplog.text  # the operator sees it
