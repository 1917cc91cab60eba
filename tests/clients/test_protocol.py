from __future__ import annotations

import httpx
import pytest

from seraph_client import errors, protocol
from seraph_client.protocol import Retries, StreamReader, retry_after
from tests.clients.scripted_server import HEAD, chat_events, event


def response(status: int, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, request=httpx.Request("POST", "http://x"))


@pytest.mark.parametrize(
    ("failure", "waits"),
    [
        (response(503), True),
        (response(429), True),
        (response(500), False),
        (response(400), False),
        (response(401), False),
        (httpx.ConnectError("refused"), True),
        (httpx.ConnectTimeout("slow"), True),
        (httpx.RemoteProtocolError("closed"), True),
        (httpx.ReadError("reset"), True),
        (httpx.ReadTimeout("slow"), False),
        (httpx.PoolTimeout("full"), False),
    ],
)
def test_what_is_tried_again(failure: httpx.Response | httpx.TransportError, waits: bool) -> None:
    assert (Retries().delay(0, failure) is not None) == waits


def test_waits_double_up_to_a_limit_and_end() -> None:
    retries = Retries(max_retries=5, base_delay=1, max_delay=6, jitter=lambda: 0.0)
    assert [retries.delay(attempt, response(503)) for attempt in range(6)] == [1, 2, 4, 6, 6, None]
    assert Retries(base_delay=1, jitter=lambda: 0.999).delay(0, response(503)) == pytest.approx(0.5, abs=0.01)


def test_retry_after_takes_the_place_of_the_wait() -> None:
    retries = Retries(base_delay=1, max_delay=6)
    assert retries.delay(0, response(503, retry_after="5")) == 5
    assert retries.delay(0, response(429, retry_after="0")) == 0
    assert retries.delay(0, response(503, retry_after="7")) is None
    assert retries.delay(2, response(503, retry_after="0")) is None


def test_retry_after_header() -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert retry_after(date, now=lambda: 1445412475.0) == 5
    assert retry_after(date, now=lambda: 1445412500.0) == 0
    assert retry_after(" 3 ") == 3
    assert [retry_after(value) for value in (None, "", "soon", "-1", "1.5")] == [None] * 5


@pytest.mark.parametrize("base_url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_base_url_with_or_without_v1(base_url: str) -> None:
    assert protocol.normalize_base_url(base_url) == "http://h:1"


def test_options_become_fields() -> None:
    body = protocol.chat_body("Hi", "m", {"temperature": 0, "extra": {"new": 1}, "model": "other"}, stream=False)
    assert body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "new": 1}
    body = protocol.completion_body([1, 2], "m", {}, stream=True)
    assert body == {"model": "m", "prompt": [1, 2], "stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
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
    answer = httpx.Response(status, json=body, headers={"x-request-id": "r"})
    error = protocol.status_error(answer)
    assert type(error) is kind
    assert isinstance(error, errors.SeraphClientError)
    assert (str(error), error.status, error.type, error.code, error.param, error.request_id) == (
        "m", status, "t", "c", "p", "r",
    )  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"[]", b'{"error": "x"}', b'{"error": {}}'])
def test_an_error_that_is_not_the_api_s_is_quoted(body: bytes) -> None:
    error = protocol.status_error(httpx.Response(502, content=body))
    assert str(error).startswith("502 Bad Gateway: ")
    assert error.type is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data": 3}', b'{"id":"a","model":"m","choices":[],"usage":{}}'])
def test_answers_of_something_else(body: bytes) -> None:
    answer = httpx.Response(200, content=body)
    with pytest.raises(errors.ProtocolError, match="not what the API describes"):
        protocol.read_answer(answer)
    with pytest.raises(errors.ProtocolError, match="not what the API describes"):
        protocol.read_models(answer)


def test_chunks_before_an_error_are_given_out_first() -> None:
    reader = StreamReader()
    error = event({"error": {"message": "boom", "type": "server_error", "code": "engine_dead", "param": None}})
    chunks = reader.feed(b"".join(chat_events("a", "b")[:3]) + error)
    assert [chunk.text for chunk in chunks] == ["", "a", "b"]
    assert isinstance(reader.failure, errors.StreamError)
    assert (str(reader.failure), reader.failure.code) == ("boom", "engine_dead")


def test_what_follows_the_end_is_ignored() -> None:
    reader = StreamReader()
    reader.feed(b"".join(chat_events("a")) + b"data: rubbish\n\n")
    reader.end()
    assert reader.is_done
    assert reader.failure is None


@pytest.mark.parametrize("data", ["rubbish", "3", "[]", "{}", '{"choices": [{}]}', '{"error": 3}'])
def test_events_of_something_else(data: str) -> None:
    reader = StreamReader()
    assert reader.feed(f"data: {data}\n\n".encode()) == []
    assert isinstance(reader.failure, errors.ProtocolError)


def test_completion_chunks() -> None:
    reader = StreamReader()
    choice = {"index": 1, "text": "x", "finish_reason": "length"}
    (chunk,) = reader.feed(event({**HEAD, "object": "text_completion", "choices": [choice]}))
    assert (chunk.index, chunk.text, chunk.finish_reason) == (1, "x", "length")
