"""Chunks out of the bytes of a streamed answer, without I/O."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from seraph_client.answers import logprobs, quoted, token_ids, usage
from seraph_client.errors import APIConnectionError, ProtocolError, SeraphClientError, StreamError
from seraph_client.sse import EventDecoder
from seraph_client.types import Answer, Choice, Chunk, ToolCall, ToolCallDelta, Usage

T = TypeVar("T")


class StreamReader:
    """Takes bytes as they come; `take` gives out the chunks, and raises what went wrong once they have been given out.

    `has_ended`: no more bytes are wanted.
    """

    def __init__(self, request_id: str | None = None) -> None:
        self._events = EventDecoder()
        self._chunks: deque[Chunk] = deque()
        self._given: list[Chunk] = []
        self._is_cut = False  # not all of the answer was given out, nor will be
        self._failure: SeraphClientError | None = None
        self.request_id = request_id
        self.id: str | None = None
        self.model: str | None = None
        self.usage: Usage | None = None
        self.is_done = False  # [DONE] has come; what follows is read, so that the connection can be used again
        self.has_ended = False

    def take(self) -> Chunk | None:
        """The next chunk; None where it has not come yet or, once `has_ended`, there is none.

        Raises SeraphClientError.
        """
        if self._chunks:
            self._given.append(self._chunks.popleft())
            return self._given[-1]
        if self._failure is not None:
            raise self._failure
        return None

    def answer(self) -> Answer:
        """All chunks put together, once they have been given out. Raises SeraphClientError where some were dropped."""
        if self._is_cut:
            raise APIConnectionError("The stream was closed before its end was read.", request_id=self.request_id)
        if self.id is None or self.model is None or self.usage is None:
            raise ProtocolError("The stream has not told its id, model and usage.", request_id=self.request_id)
        gathered = defaultdict[int, list[Chunk]](list)
        for chunk in self._given:
            gathered[chunk.index].append(chunk)
        choices = tuple(_joined(index, gathered[index]) for index in sorted(gathered))
        return Answer(self.id, self.model, choices, self.usage)

    def feed(self, received: bytes) -> None:
        """More bytes of the answer."""
        try:
            for data in self._events.feed(received):
                if self.is_done:
                    break
                if data == "[DONE]":
                    self.is_done = True
                else:
                    self._chunks += self._read(data)
        except SeraphClientError as failure:
            failure.request_id = self.request_id
            self.fail(failure)

    def fail(self, failure: SeraphClientError) -> None:
        """The answer cannot go on. What goes wrong once it is complete changes nothing."""
        self.has_ended = True
        if not self.is_done and self._failure is None:
            self._failure = failure

    def end(self) -> None:
        """The bytes have ended; a failure where the answer has not."""
        self.fail(
            APIConnectionError("The stream broke off before the answer was complete.", request_id=self.request_id)
        )

    def drop(self) -> None:
        """The caller wants no more: what has come and was not given out is lost, a failure too."""
        self._is_cut |= bool(self._chunks) or not self.is_done
        self._chunks.clear()
        self._failure = None
        self.is_done = self.has_ended = True

    def _read(self, data: str) -> list[Chunk]:
        try:
            value = json.loads(data)
            if (error := value.get("error")) is not None:
                raise StreamError(
                    str(error["message"]), type=error.get("type"), code=error.get("code"), param=error.get("param")
                )
            self.id, self.model = value["id"], value["model"]
            if (counted := value.get("usage")) is not None:
                self.usage = usage(counted)
            return [_chunk({**value, **choice}) for choice in value["choices"]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProtocolError(f"An event is not what the API describes: {quoted(data)}") from None


def _chunk(value: Mapping[str, Any]) -> Chunk:
    """Of a choice, and what stands beside the choices: a chat's prompt."""
    delta = value.get("delta") or {}
    return Chunk(
        index=value["index"],
        text=(delta.get("content") or "") if "delta" in value else value["text"],
        finish_reason=value["finish_reason"],
        logprobs=logprobs(value.get("logprobs")),
        tool_calls=tuple(_tool_call_delta(each) for each in delta.get("tool_calls") or ()),
        reasoning=delta.get("reasoning") or "",
        token_ids=token_ids(value.get("token_ids")),
        prompt_token_ids=token_ids(value.get("prompt_token_ids")),
    )


def _tool_call_delta(value: Mapping[str, Any]) -> ToolCallDelta:
    function = value["function"]
    return ToolCallDelta(value["index"], value.get("id"), function.get("name"), function.get("arguments") or "")


def _joined(index: int, chunks: Sequence[Chunk]) -> Choice:
    """A choice out of its chunks."""
    calls = defaultdict[int, list[ToolCallDelta]](list)
    for delta in (delta for chunk in chunks for delta in chunk.tool_calls):
        calls[delta.index].append(delta)
    return Choice(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        finish_reason="".join(chunk.finish_reason or "" for chunk in chunks),
        logprobs=_concatenated(chunk.logprobs for chunk in chunks),
        tool_calls=tuple(_tool_call(calls[which]) for which in sorted(calls)),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        token_ids=_concatenated(chunk.token_ids for chunk in chunks),
        prompt_token_ids=_concatenated(chunk.prompt_token_ids for chunk in chunks),
    )


def _tool_call(deltas: Sequence[ToolCallDelta]) -> ToolCall:
    return ToolCall(
        id="".join(delta.id or "" for delta in deltas),
        name="".join(delta.name or "" for delta in deltas),
        arguments="".join(delta.arguments for delta in deltas),
    )


def _concatenated(parts: Iterable[tuple[T, ...] | None]) -> tuple[T, ...] | None:
    """None where no part is there."""
    there = [part for part in parts if part is not None]
    return tuple(each for part in there for each in part) if there else None


class StreamFacts:
    """What both clients' streams know beside their chunks."""

    _reader: StreamReader

    @property
    def id(self) -> str | None:
        """The answer's id, from the first chunk on."""
        return self._reader.id

    @property
    def model(self) -> str | None:
        """The model that answers, from the first chunk on."""
        return self._reader.model

    @property
    def usage(self) -> Usage | None:
        """Tokens of the whole answer, once it has ended."""
        return self._reader.usage

    @property
    def request_id(self) -> str | None:
        """The server's name for the request in its log."""
        return self._reader.request_id
