"""Chunks out of the bytes of a streamed answer, without I/O."""

from __future__ import annotations

import json
from collections import deque

from seraph_client.answers import quoted, usage
from seraph_client.errors import APIConnectionError, ProtocolError, SeraphClientError, StreamError
from seraph_client.sse import EventDecoder
from seraph_client.types import Chunk, Usage


class StreamReader:
    """Takes bytes as they come; `take` gives out the chunks, and raises what went wrong once they have been given out.

    `has_ended`: no more bytes are wanted.
    """

    def __init__(self, request_id: str | None = None) -> None:
        self._events = EventDecoder()
        self._chunks: deque[Chunk] = deque()
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
            return self._chunks.popleft()
        if self._failure is not None:
            raise self._failure
        return None

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
            return [
                Chunk(
                    index=choice["index"],
                    text=(choice["delta"].get("content") or "") if "delta" in choice else choice["text"],
                    finish_reason=choice["finish_reason"],
                    logprobs=choice.get("logprobs"),
                )
                for choice in value["choices"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProtocolError(f"An event is not what the API describes: {quoted(data)}") from None


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
