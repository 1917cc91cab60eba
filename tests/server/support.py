"""An application over the scripted engine, a client that speaks to it in process, and readers of streams."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from server.app import create_app
from server.routes.service import Service
from server.settings import Settings
from tests.server.fakes import FakeEngine, FakeText

Client = httpx.AsyncClient


def settings(**changes: Any) -> Settings:
    return Settings(**{"model": "m", **changes})


def chat(content: Any = "Hi", **fields: Any) -> dict[str, Any]:
    """A chat request body."""
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


@asynccontextmanager
async def client_for(
    engine: FakeEngine, configured: Settings | None = None, *, base_url: str = "http://localhost"
) -> AsyncIterator[Client]:
    """A client of an application whose engine has started."""
    app = create_app(configured or settings(), engine, FakeText())
    async with app.router.lifespan_context(app):
        service: Service = app.state.service
        while not service.started:
            await loop_turn()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            yield client


async def loop_turn() -> None:
    """Let every task that can run do so once."""
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
