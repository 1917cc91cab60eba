from __future__ import annotations

import base64
import json
from array import array
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest

from seraph_client import Health, OverloadedError, answers, errors
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


def test_logprobs_are_handed_on() -> None:
    logprobs: dict[str, Any] = {"content": []}
    choice = {"index": 0, "message": {"content": None}, "finish_reason": "stop", "logprobs": logprobs}
    answer = answers.answer(reply({**HEAD, "choices": [choice], "usage": USAGE}))
    assert (answer.text, answer.choices[0].logprobs) == ("", logprobs)


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
