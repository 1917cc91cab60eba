from __future__ import annotations

import pytest

from seraph_client import APIConnectionError, Chunk, SeraphClientError, errors
from seraph_client.reader import StreamReader
from tests.clients.scripted_server import HEAD, chat_events, event


def taken(reader: StreamReader) -> tuple[list[Chunk], SeraphClientError | None]:
    """The chunks that a reader gives out, and what it raises after them."""
    chunks: list[Chunk] = []
    failure: SeraphClientError | None = None
    try:
        while (chunk := reader.take()) is not None:
            chunks.append(chunk)
    except SeraphClientError as error:
        failure = error
    return chunks, failure


def test_chunks_before_an_error_are_given_out_first() -> None:
    reader = StreamReader("r1")
    error = event({"error": {"message": "boom", "type": "server_error", "code": "engine_dead", "param": None}})
    reader.feed(b"".join(chat_events("a", "b")[:3]) + error)
    chunks, failure = taken(reader)
    assert [chunk.text for chunk in chunks] == ["", "a", "b"]
    assert isinstance(failure, errors.StreamError)
    assert (str(failure), failure.code, failure.request_id) == ("boom", "engine_dead", "r1")
    assert reader.has_ended


def test_what_follows_the_end_is_ignored() -> None:
    reader = StreamReader()
    reader.feed(b"".join(chat_events("a")) + b"data: rubbish\n\n")
    assert (reader.is_done, reader.has_ended) == (True, False), "the connection is read to the answer's end"
    reader.end()
    assert taken(reader)[1] is None
    assert reader.take() is None


def test_a_break_is_a_failure_that_knows_the_request() -> None:
    reader = StreamReader("r2")
    reader.feed(chat_events("a")[0])
    reader.end()
    _, failure = taken(reader)
    assert isinstance(failure, APIConnectionError)
    assert failure.request_id == "r2"


def test_what_is_dropped_is_not_given_out() -> None:
    reader = StreamReader()
    reader.feed(b"".join(chat_events("a")[:2]))
    reader.drop()
    reader.end()
    assert taken(reader) == ([], None)


@pytest.mark.parametrize("data", ["rubbish", "3", "[]", "{}", '{"choices": [{}]}', '{"error": 3}'])
def test_events_of_something_else(data: str) -> None:
    reader = StreamReader()
    reader.feed(f"data: {data}\n\n".encode())
    chunks, failure = taken(reader)
    assert chunks == []
    assert isinstance(failure, errors.ProtocolError)


def test_completion_chunks() -> None:
    reader = StreamReader()
    logprobs = {"tokens": ["x"]}
    choice = {"index": 1, "text": "x", "finish_reason": "length", "logprobs": logprobs}
    reader.feed(event({**HEAD, "object": "text_completion", "choices": [choice]}))
    assert taken(reader)[0] == [Chunk(index=1, text="x", finish_reason="length", logprobs=logprobs)]
