"""What every request passes, as plain ASGI: nothing here buffers a body or hides a disconnect."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import logs
from engine.errors import RequestError
from server.admission import ANONYMOUS, OPEN_PATHS, AdminKeys, Headers, HostPolicy, Keys, Principal, is_admin_path
from server.errors import ClientDisconnectedError, error_response
from server.generation import Generation
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

        with logs.request(request_id):
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
                # A stream that its caller left began with 200, and that is not how it ended.
                outcome = 499 if scope["state"].get("disconnected") else status
                self._count(scope, outcome, self._clock() - arrived)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")  # the pattern: paths are the caller's to invent
        method = scope["method"] if route != "unmatched" else ""
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        level = logging.DEBUG if route in OPEN_PATHS or route == "/metrics" else logging.INFO
        if logger.isEnabledFor(level):
            self._log(level, scope, status, seconds)

    def _log(self, level: int, scope: Scope, status: int, seconds: float) -> None:
        """One line per request; of one that generated, with its tokens."""
        path = logs.one_line(scope["path"])
        text = f"{scope['method']} {path} {status} {seconds:.3f}s"
        values = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 6)}
        generation: Generation | None = scope["state"].get("generation")
        if generation is not None:
            usage, first = generation.usage(), generation.time_to_first_token()
            cached = usage.prompt_tokens_details.cached_tokens
            text += f" {generation.answer_id}: {usage.prompt_tokens} tokens in ({cached} cached)"
            text += f", {usage.completion_tokens} out" + ("" if first is None else f", first after {first:.3f}s")
            values |= {
                "answer_id": generation.answer_id,
                "prompt_tokens": usage.prompt_tokens,
                "cached_tokens": cached,
                "completion_tokens": usage.completion_tokens,
                "time_to_first_token": None if first is None else round(first, 6),
            }
        logger.log(level, "%s", text, extra=logs.extra(**values))


class Door:
    """Checks the Host header, then the key; finds out the principal."""

    def __init__(self, app: ASGIApp, *, keys: Keys, admin_keys: AdminKeys, hosts: HostPolicy) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            state, headers = scope["state"], scope["headers"]
            try:
                self._hosts.check(headers)
                state["principal"] = self._authenticate(scope["path"], headers)
            except RequestError as error:  # answered here, so that it passes CORS on its way out
                await error_response(error, state["request_id"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _authenticate(self, path: str, headers: Headers) -> Principal:
        if is_admin_path(path):
            return self._admin_keys.authenticate(headers)
        return ANONYMOUS if path in OPEN_PATHS else self._keys.authenticate(headers)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode())
    return f"req-{uuid.uuid4().hex}"
