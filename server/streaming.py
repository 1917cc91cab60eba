"""Server-sent events as a raw ASGI response: one send per batch of chunks, keep-alive comments, errors as events."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import ClientDisconnectedError, error_body

logger = logging.getLogger("seraph.server")

KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, and proxies see that the connection lives."""

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends what `events` yields as it comes.

    The status line waits for the first event, so an error before it still becomes an HTTP error with its own status.
    An error after it becomes a last `data: {"error": ...}` event. `events` is closed whatever happens; what it holds
    (room at the gate, the engine's work) is released by its own `async with`.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, headers: Mapping[str, str] | None = None, request_id: str
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._events = events
        self._request_id = request_id
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # reverse proxies pass each event on at once
            *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for frame in self._events:
                if not started:
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    started = True
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except ClientDisconnectedError:
            scope["state"]["disconnected"] = True
            if not started:
                raise
        except Exception as error:
            if not started:
                raise
            logger.warning("request %s failed in mid-stream: %s", self._request_id, error)
            frame = b"data: " + msgspec.json.encode(error_body(error, self._request_id)) + b"\n\n"
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
