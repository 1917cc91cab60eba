"""An application over the scripted engine, a client that speaks to it in process, and readers of streams."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn

from engine.backends.base import Engine
from server.app import create_app
from server.protocol import BoundedProtocol
from server.registry import ServedModel
from server.routes.service import Service
from server.serving import bind, watch_peers
from server.settings import Settings
from tests.server.fakes import FakeEngine, FakeText

Client = httpx.AsyncClient


def settings(**changes: Any) -> Settings:
    return Settings(**{"model": ("m",), **changes})


def served(
    engine: Engine, configured: Settings | None = None, *, defaults: Mapping[str, float] | None = None
) -> ServedModel:
    """The first model of the settings, over an engine, with a text side of one token per character."""
    configured = configured or settings()
    return ServedModel(
        names=configured.model_names[0],
        source=configured.model[0],
        engine=engine,
        text=FakeText(),
        generation_defaults=defaults or {},
    )


def chat(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """A chat request body."""
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


@asynccontextmanager
async def client_for(
    engine: FakeEngine,
    configured: Settings | None = None,
    *,
    base_url: str = "http://localhost",
    defaults: Mapping[str, float] | None = None,
) -> AsyncIterator[Client]:
    """A client of an application whose engine has started; `defaults` are its generation defaults."""
    configured = configured or settings()
    app = create_app(configured, [served(engine, configured, defaults=defaults)])
    async with app.router.lifespan_context(app):
        service: Service = app.state.service
        await wait_until(lambda: service.started)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            yield client


async def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let other tasks run until a condition holds; TimeoutError after a time that only a fault can take."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # conditions of others, who set no event
            await asyncio.sleep(0)


def chunks_of(body: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended with [DONE]."""
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """Each choice's text, by index."""
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
    return dict(texts)


@asynccontextmanager
async def listening(
    engine: Engine,
    configured: Settings | None = None,
    *,
    head_timeout: float = 60.0,
    send_buffer: int | None = None,
) -> AsyncIterator[str]:
    """The application behind a real uvicorn on loopback; yields its address."""

    class Protocol(BoundedProtocol):
        pass

    Protocol.head_timeout = head_timeout
    configured = configured or settings()
    app = create_app(configured, [served(engine, configured)])
    config = uvicorn.Config(app, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as listener:
        watch_peers(listener, configured.send_timeout)
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.listen()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await wait_until(lambda: engine.ready)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
