"""uvicorn's HTTP/1.1 protocol with the bounds it lacks: bytes of a request's head, and the time it may take."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

MAX_HEAD_BYTES = 32 << 10
"""Request line and header fields together; the OpenAI SDK sends about 1 KB."""
MAX_HEADERS = 128
"""Header fields; the OpenAI SDK sends about 20, and every layer of the application goes through them."""


class BoundedProtocol(HttpToolsProtocol):
    """Bounds a request's head: MAX_HEAD_BYTES and MAX_HEADERS (431), and `head_timeout`, after which it closes.

    A connection that sends nothing, or a head byte by byte, would otherwise be held for as long as its peer likes.
    """

    head_timeout = 60.0  # seconds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_head_bytes = 0
        self._num_headers = 0
        self._in_head = True
        self._num_unparsed_bytes = 0  # of the head: a field is parsed once it is whole, and may never be
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._num_unparsed_bytes += len(data)
            if self._head_is_too_large:
                self.send_400_response("request head too large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._num_head_bytes = self._num_headers = self._num_unparsed_bytes = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What could not be parsed, as an OpenAI error body."""
        status, message = 400, "The request is not valid HTTP/1.1."
        if self._head_is_too_large:
            most = f"{MAX_HEAD_BYTES} bytes and {MAX_HEADERS} header fields"
            status, message = 431, f"The request's head must be at most {most}."
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_http"}
        body = msgspec.json.encode({"error": error})
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    @property
    def _head_is_too_large(self) -> bool:
        num_bytes = max(self._num_head_bytes, self._num_unparsed_bytes)
        return num_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._head_is_too_large:
            raise ValueError("request head too large")  # the parser stops, and send_400_response is called

    def _expect_head(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.head_timeout, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
