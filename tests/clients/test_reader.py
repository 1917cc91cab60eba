from __future__ import annotations

from typing import Any

import pytest

from seraph_client import (
    Answer,
    APIConnectionError,
    Choice,
    Chunk,
    Logprob,
    SeraphClientError,
    ToolCall,
    ToolCallDelta,
    errors,
)
from seraph_client.answers import usage
from seraph_client.reader import StreamReader
from tests.clients.scripted_server import HEAD, USAGE, chat_events, event

CALL_OF_NOTHING = '{"id": "i", "model": "m", "choices": [{"index": 0, "delta": {"tool_calls": [{}]}}]}'


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


@pytest.mark.parametrize("data", ["rubbish", "3", "[]", "{}", '{"choices": [{}]}', '{"error": 3}', CALL_OF_NOTHING])
def test_events_of_something_else(data: str) -> None:
    reader = StreamReader()
    reader.feed(f"data: {data}\n\n".encode())
    chunks, failure = taken(reader)
    assert chunks == []
    assert isinstance(failure, errors.ProtocolError)


def test_completion_chunks() -> None:
    reader = StreamReader()
    logprobs = {"tokens": ["x"], "token_logprobs": [-1.5], "top_logprobs": [{"x": -1.5}], "text_offset": [4]}
    choice = {"index": 1, "text": "x", "finish_reason": "length", "logprobs": logprobs, "token_ids": [7]}
    reader.feed(event({**HEAD, "object": "text_completion", "choices": [choice]}))
    read = (Logprob("x", -1.5, (Logprob("x", -1.5),), offset=4),)
    assert taken(reader)[0] == [Chunk(index=1, text="x", finish_reason="length", logprobs=read, token_ids=(7,))]


def gained(index: int = 0, reason: str | None = None, **delta: Any) -> bytes:
    return event({**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": reason}], "usage": None})


def call_gained(call: int, arguments: str, **begin: Any) -> bytes:
    name = {"name": begin.pop("name")} if begin else {}
    return gained(tool_calls=[{"index": call, **begin, "function": {**name, "arguments": arguments}}])


CALLING = (
    gained(role="assistant", content=""),
    gained(reasoning="Hm", reasoning_content="Hm"),
    gained(reasoning=".", reasoning_content="."),
    gained(index=1, content="No"),
    gained(content="Let me see."),
    call_gained(0, "", id="a", type="function", name="turn"),
    call_gained(0, '{"to": '),
    call_gained(0, '"left"}'),
    gained(index=1, content="."),
    call_gained(1, "", id="b", type="function", name="stop"),
    call_gained(1, "{}"),
    gained(reason="tool_calls"),
    gained(index=1, reason="stop"),
    event({**HEAD, "choices": [], "usage": USAGE}),
    b"data: [DONE]\n\n",
)


def test_chunks_of_calls() -> None:
    reader = StreamReader()
    reader.feed(b"".join(CALLING))
    chunks, _ = taken(reader)
    assert [chunk.reasoning for chunk in chunks if chunk.reasoning] == ["Hm", "."]
    assert [delta for chunk in chunks for delta in chunk.tool_calls] == [
        ToolCallDelta(0, "a", "turn", ""),
        ToolCallDelta(0, None, None, '{"to": '),
        ToolCallDelta(0, None, None, '"left"}'),
        ToolCallDelta(1, "b", "stop", ""),
        ToolCallDelta(1, None, None, "{}"),
    ]


def test_chunks_add_up_to_the_answer() -> None:
    reader = StreamReader("r")
    reader.feed(b"".join(CALLING))
    taken(reader)
    calls = (ToolCall("a", "turn", '{"to": "left"}'), ToolCall("b", "stop", "{}"))
    assert reader.answer() == Answer(
        "chatcmpl-1",
        "m",
        (Choice(0, "Let me see.", "tool_calls", tool_calls=calls, reasoning="Hm."), Choice(1, "No.", "stop")),
        usage(USAGE),
    )
    reader.drop()
    assert reader.answer().tool_calls == calls, "it had been given out"


def test_what_was_dropped_is_missed() -> None:
    for received in (CALLING[:3], CALLING):
        reader = StreamReader("r")
        reader.feed(b"".join(received))
        assert reader.take() is not None
        reader.drop()
        with pytest.raises(APIConnectionError, match="closed before") as caught:
            reader.answer()
        assert caught.value.request_id == "r"


def test_an_answer_without_its_usage() -> None:
    reader = StreamReader("r")
    reader.feed(CALLING[0] + CALLING[-1])
    taken(reader)
    with pytest.raises(errors.ProtocolError, match="usage"):
        reader.answer()
