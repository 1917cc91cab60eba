from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest

from seraph_client import Choice, Health, Logprob, OverloadedError, PromptLogprob, ToolCall, answers, errors
from seraph_client.answers import Reply
from tests.clients.scripted_server import HEAD, USAGE

TEXTS_USAGE = {"prompt_tokens": 5, "total_tokens": 5}


def reply(body: Any, status: int = 200) -> Reply:
    """A reply with this body, as JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(status, HTTPStatus(status).phrase, {"x-request-id": "r"}, raw)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
        (409, errors.ConflictError),
        (413, errors.RequestTooLargeError),
        (418, errors.BadRequestError),
        (429, errors.RateLimitError),
        (500, errors.ServerError),
        (503, errors.OverloadedError),
        (504, errors.ServerError),
    ],
)
def test_each_status_has_its_class(status: int, kind: type[errors.APIStatusError]) -> None:
    body = {"error": {"message": "m", "type": "t", "code": "c", "param": "p"}}
    error = answers.status_error(reply(body, status))
    assert type(error) is kind
    assert isinstance(error, errors.SeraphClientError)
    assert (str(error), error.status, error.type, error.code, error.param, error.request_id) == (
        "m", status, "t", "c", "p", "r",
    )  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"[]", b'{"error": "x"}', b'{"error": {}}'])
def test_an_error_that_is_not_the_api_s_is_quoted(body: bytes) -> None:
    error = answers.status_error(reply(body, 502))
    assert str(error).startswith("502 Bad Gateway: ")
    assert error.type is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data": 3}', b'{"id":"a","model":"m","choices":[],"usage":{}}'])
@pytest.mark.parametrize(
    "read",
    [
        answers.answer,
        answers.embeddings,
        answers.scores,
        answers.ranking,
        answers.tokens,
        answers.prompt,
        answers.models,
        answers.version,
        answers.health,
        answers.loaded_models,
        answers.loaded_model,
    ],
)
def test_answers_of_something_else(read: Callable[[Reply], object], body: bytes) -> None:
    with pytest.raises(errors.ProtocolError, match="not what the API describes") as caught:
        read(reply(body))
    assert caught.value.request_id == "r"


def choice_of(choice: dict[str, Any], **beside: Any) -> Choice:
    """One choice of an answer, read."""
    value = {**HEAD, "choices": [{"index": 0, "finish_reason": "stop", **choice}], "usage": USAGE, **beside}
    (read,) = answers.answer(reply(value)).choices
    return read


def test_logprobs_of_a_chat() -> None:
    best = [{"token": text, "logprob": -i, "bytes": list(text.encode())} for i, text in enumerate("ab")]
    other = {"token": "bytes:\\xf0", "logprob": -7.5, "bytes": [0xF0], "top_logprobs": best}
    read = choice_of({"message": {"content": None}, "logprobs": {"content": [other], "refusal": None}})
    tops = (Logprob("a", 0, raw=b"a"), Logprob("b", -1, raw=b"b"))
    assert read.logprobs == (Logprob("bytes:\\xf0", -7.5, tops, raw=b"\xf0"),)
    assert (read.text, read.tool_calls, read.reasoning, read.token_ids) == ("", (), "", None)


def test_logprobs_of_a_completion_and_of_its_prompt() -> None:
    written = {
        "tokens": ["x", "y"], "token_logprobs": [None, -1.5], "top_logprobs": [None, {"z": -0.5, "y": -1.5}],
        "text_offset": [0, 1],
    }  # fmt: skip
    of_prompt = [None, {"17": {"logprob": -2.0, "rank": 3, "decoded_token": "x"}}]
    own = {"prompt_logprobs": of_prompt, "prompt_token_ids": [4, 17], "token_ids": [5]}
    read = choice_of({"text": "xy", "logprobs": written, **own})
    assert read.logprobs == (
        Logprob("x", None, offset=0),
        Logprob("y", -1.5, (Logprob("z", -0.5), Logprob("y", -1.5)), offset=1),
    )
    assert read.prompt_logprobs == (None, {17: PromptLogprob("x", -2.0, 3)})
    assert (read.prompt_token_ids, read.token_ids) == ((4, 17), (5,))


def test_what_a_chat_tells_of_its_prompt_is_every_choice_s() -> None:
    beside = {"prompt_logprobs": [None, {"17": {"logprob": -2.0, "rank": 3, "decoded_token": "x"}}]}
    read = choice_of({"message": {"content": "x"}, "token_ids": [5]}, prompt_token_ids=[4, 17], **beside)
    assert read.prompt_logprobs == (None, {17: PromptLogprob("x", -2.0, 3)})
    assert (read.prompt_token_ids, read.token_ids) == ((4, 17), (5,))


def test_calls_of_tools() -> None:
    function = {"name": "turn", "arguments": '{"to": "left"}'}
    message = {
        "role": "assistant", "content": None, "reasoning": "Hm.",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }  # fmt: skip
    read = choice_of({"message": {**message, "refusal": None, "reasoning_content": "Hm."}})
    (call,) = read.tool_calls
    assert call == ToolCall("call_1", "turn", '{"to": "left"}')
    assert (read.text, read.reasoning) == ("", "Hm.")
    assert read.message == message, "as it came, and as it goes back"
    assert call.result("Turned.") == {"role": "tool", "tool_call_id": "call_1", "content": "Turned."}
    assert choice_of({"message": {"content": ""}}).message == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}},
        {"message": {"content": None, "tool_calls": [3]}},
        {"message": None},
        {"text": "x", "logprobs": {"tokens": ["x"]}},
        {"text": "x", "logprobs": {"content": [{"token": "x"}]}},
        {"text": "x", "prompt_logprobs": [{"seven": {"logprob": 0, "rank": 1, "decoded_token": "x"}}]},
        {"text": "x", "token_ids": ["x"]},
    ],
)
def test_choices_of_something_else(choice: dict[str, Any]) -> None:
    with pytest.raises(errors.ProtocolError):
        choice_of(choice)


def test_vectors_are_the_same_however_they_travel() -> None:
    rows = np.random.default_rng(1).standard_normal((3, 31)).astype(np.float32)
    coded = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
    for written in (rows.tolist(), coded):
        data = [{"index": i, "embedding": value} for i, value in enumerate(written)][::-1]
        found = answers.embeddings(reply({"model": "m", "data": data, "usage": TEXTS_USAGE}))
        assert found.vectors == rows.tolist()
        assert np.array_equal(found.numpy(), rows)
        assert found.numpy().dtype == np.float32
        assert found.prompt_tokens == 5
    assert answers.embeddings(reply({"model": "m", "data": [], "usage": TEXTS_USAGE})).vectors == []


@pytest.mark.parametrize("value", ["?", "AAA=", base64.b64encode(b"12345").decode(), ["x"], None])
def test_a_vector_that_is_none(value: Any) -> None:
    data = [{"index": 0, "embedding": value}]
    with pytest.raises(errors.ProtocolError):
        answers.embeddings(reply({"model": "m", "data": data, "usage": TEXTS_USAGE}))


def test_vectors_need_no_numpy() -> None:
    data = [{"index": 0, "embedding": [0.5, 2]}]
    found = answers.embeddings(reply({"model": "m", "data": data, "usage": TEXTS_USAGE}))
    assert found.packed == (array("f", [0.5, 2.0]),)


def test_health_says_which_model_is_in_trouble() -> None:
    troubled = answers.health(reply({"status": "restarting", "models": {"b": "restarting"}}, 503))
    assert troubled == Health("restarting", {"b": "restarting"})
    assert not troubled.is_ready
    assert answers.health(reply({"status": "ready"})).is_ready
    with pytest.raises(OverloadedError, match="no upstream"):
        answers.health(reply(b"no upstream", 503))


def test_what_is_gone_at_once() -> None:
    assert answers.unloading(reply(b"", 204)) is None
