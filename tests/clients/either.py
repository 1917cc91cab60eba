"""One test for both clients: calls that are awaited in any case."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any

from seraph_client import AsyncClient, AsyncStream, Client, Stream


class Either:
    """One of the clients, or of their streams, its calls awaitable in any case."""

    def __init__(self, client: Client | AsyncClient | Stream | AsyncStream) -> None:
        self.client = client

    async def __call__(self, name: str, /, *args: Any, **options: Any) -> Any:
        """What a method returns; "admin.load" is one of the operator's."""
        target: Any = self.client
        for part in name.split("."):
            target = getattr(target, part)
        found = target(*args, **options)
        return await found if inspect.isawaitable(found) else found


async def close(closable: Any) -> None:
    closed = closable.close()
    if inspect.isawaitable(closed):
        await closed


async def chunks_of(streamed: Any) -> AsyncIterator[Any]:
    if hasattr(streamed, "__anext__"):
        async for chunk in streamed:
            yield chunk
    else:
        for chunk in streamed:
            yield chunk


async def collect(streamed: Any, texts: list[str]) -> None:
    """Add the texts of a stream to a list, which also has them where the stream fails."""
    async for chunk in chunks_of(streamed):
        texts.append(chunk.text)  # noqa: PERF401  # not all at the end
