"""A real core behind the `Engine` interface, stepped by a task of the event loop: tests can look into its books."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import numpy as np
from numpy.typing import NDArray

from engine.core import EngineCore
from engine.request import Capabilities, EmbedRequest, EngineStats, Request, TokenDelta


class CoreEngine:
    """One step at a time, and between two of them everybody else's turn."""

    pid = None

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.alive = self.ready = False
        self.num_generating = 0
        self._deltas: dict[str, asyncio.Queue[TokenDelta]] = {}
        self._wanted = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Nobody asks for anything, and the core holds nothing."""
        return not self.num_generating and not self.core.has_work

    async def start(self) -> None:
        self.alive = self.ready = True
        self._stepping = asyncio.create_task(self._step())

    async def _step(self) -> None:
        while True:
            await self._wanted.wait()
            for delta in self.core.step():
                if delta.request_id in self._deltas:
                    self._deltas[delta.request_id].put_nowait(delta)
            if not self.core.has_work:
                self._wanted.clear()
            await asyncio.sleep(0)

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        self.num_generating += 1
        self._deltas[request.request_id] = asyncio.Queue()
        try:
            self.core.add(request)
            self._wanted.set()
            while True:
                delta = await self._deltas[request.request_id].get()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self.core.abort(request.request_id)
            del self._deltas[request.request_id]
            self.num_generating -= 1

    async def embed(self, request: EmbedRequest) -> NDArray[np.float32]:
        raise AssertionError("it has no encoder")

    def capabilities(self) -> Capabilities:
        return self.core.capabilities()

    async def stats(self) -> EngineStats:
        return self.core.stats()

    async def stop(self, drain: float) -> None:
        self.alive = self.ready = False
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.gather(self._stepping, return_exceptions=True)
            self._stepping = None
            self.core.close()
