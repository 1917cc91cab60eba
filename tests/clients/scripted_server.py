"""A real HTTP server whose answers a test writes: uvicorn in a thread, on a free loopback port."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvicorn

Answerer = Callable[[Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]
"""Takes ASGI's receive and send."""

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 4},
}


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class ScriptedServer:
    """Gives out `answers` in turn, and repeats the last one."""

    answers: deque[Answerer] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    disconnected: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def script(self, *answers: Answerer) -> None:
        self.answers.extend(answers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append(Seen(scope["method"], scope["path"], headers, json.loads(body) if body else None))
        self.arrived.set()
        answer = self.answers.popleft() if len(self.answers) > 1 else self.answers[0]
        await answer(receive, send)


def respond(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answerer:
    """One whole answer; `body` is sent as JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"content-type": "application/json", "content-length": str(len(raw)), **(headers or {})}

    async def answer(receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": _raw(fields)})
        await send({"type": "http.response.body", "body": raw})

    return answer


def fail(status: int, message: str = "no", headers: Mapping[str, str] | None = None, **error: Any) -> Answerer:
    """An OpenAI error."""
    return respond({"error": {"message": message, "type": "t", "param": None, "code": None, **error}}, status, headers)


def stream(*pieces: bytes, then: str = "end", server: ScriptedServer | None = None) -> Answerer:
    """A streamed answer in these pieces, which then ends, breaks off ("break") or waits for the client ("wait")."""

    async def answer(receive: Any, send: Any) -> None:
        fields = {"content-type": "text/event-stream"}
        await send({"type": "http.response.start", "status": 200, "headers": _raw(fields)})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if then == "break":
            raise ConnectionAbortedError("the script says so")
        if then == "wait":
            assert server is not None
            while (await receive())["type"] != "http.disconnect":
                pass
            server.disconnected.set()
            return
        await send({"type": "http.response.body", "body": b""})

    return answer


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def chat_events(*texts: str, finish: str = "stop") -> Sequence[bytes]:
    """The events of a streamed chat: a role, these texts, the end, the usage."""

    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return event({**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], "usage": None})

    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": text}) for text in texts),
        chunk({}, finish),
        event({**HEAD, "choices": [], "usage": USAGE}),
        b"data: [DONE]\n\n",
    ]


def whole_chat(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}


class Stage:
    """One address for the scripted servers of many tests: starting and ending uvicorn takes longer than they do."""

    def __init__(self) -> None:
        self.url = ""
        self._server = ScriptedServer()

    def enter(self) -> ScriptedServer:
        """A new server, which gets the requests from now on."""
        self._server = ScriptedServer(url=self.url)
        return self._server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._server(scope, receive, send)


Running = TypeVar("Running", ScriptedServer, Stage)


@contextmanager
def running(server: Running) -> Iterator[Running]:
    """The server, reachable at its `url`. The socket listens before the thread starts: nobody has to wait."""
    listener = socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(server, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield server
    finally:
        web.should_exit = True
        thread.join()
        listener.close()


def _raw(fields: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in fields.items()]
