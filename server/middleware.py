"""What every request passes, as plain ASGI: nothing here buffers a body or hides a disconnect."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import RequestError
from server.admission import ANONYMOUS, OPEN_PATHS, HostPolicy, Keys
from server.errors import ClientDisconnectedError, error_response
from server.metrics import Metrics

logger = logging.getLogger("seraph.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")


class RequestContext:
    """Gives each request an id and a time of arrival, answers what nobody else caught, and counts the outcome.

    `x-request-id` of the caller is kept where it is harmless, and always sent back.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, clock: Callable[[], float] = time.perf_counter) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = self._clock()
        request_id = _request_id(scope)
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if isinstance(error, ClientDisconnectedError):
                status = 499
            elif status:
                raise  # too late for another answer: the server cuts the connection
            else:
                await error_response(error, request_id)(scope, receive, send_with_id)
        finally:
            self._count(scope, status, self._clock() - arrived, request_id)

    def _count(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # the pattern: paths are the caller's to invent
        method = scope["method"] if route != "unmatched" else ""
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        if route in OPEN_PATHS or route == "/metrics":
            level = logging.DEBUG
        else:
            level = logging.INFO
        logger.log(level, "%s %s %d %.3fs %s", scope["method"], scope["path"], status, seconds, request_id)


class Door:
    """Checks the Host header, then the key; finds out the principal."""

    def __init__(self, app: ASGIApp, *, keys: Keys, hosts: HostPolicy) -> None:
        self._app = app
        self._keys = keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state, headers = scope["state"], scope["headers"]
            try:
                self._hosts.check(headers)
                state["principal"] = ANONYMOUS if scope["path"] in OPEN_PATHS else self._keys.authenticate(headers)
            except RequestError as error:  # answered here, so that it passes CORS on its way out
                await error_response(error, state["request_id"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return f"req-{uuid.uuid4().hex}"
