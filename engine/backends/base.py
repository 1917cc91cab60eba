"""What every engine offers, whatever runs behind it. The interface is at the level of a request, because an engine owns
its scheduler and its cache."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.request import Capabilities, EmbedRequest, EngineStats, Request, TokenDelta


class Engine(Protocol):
    """One model behind an asynchronous, request-level interface. All calls belong to one event loop."""

    @property
    def alive(self) -> bool:
        """Started, and not given up: False before `start`, after `stop`, and once the engine stopped restarting."""
        ...

    @property
    def ready(self) -> bool:
        """Able to take a request right now; False also while restarting and while draining."""
        ...

    @property
    def pid(self) -> int | None:
        """The process that computes, where it is one of ours."""
        ...

    async def start(self) -> None:
        """Load and get ready. Raises ConfigError or ModelError for what the operator must fix, else EngineError."""
        ...

    def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """Deltas of one request, in order and without gaps; the last one has a finish_reason (ERROR: see its `error`).

        Closing the iterator (`aclose()`, or cancelling the task that reads it) aborts the request. Raises, at the
        first step at the earliest: RequestError for a request the engine refuses, EngineOverloadedError where there
        is no room, EngineDeadError where the engine died or is stopping, EngineError for any other failure.
        """
        ...

    async def embed(self, request: EmbedRequest) -> NDArray[np.float32]:
        """The vectors of texts, float32 [inputs, output size]: embeddings, or a classifier's logits.

        Cancelling the task that waits aborts the request. Raises as `generate`; RequestError also where the engine has
        no encoder.
        """
        ...

    def capabilities(self) -> Capabilities:
        """What the engine and its model can do. Known once `start` returned; EngineDeadError before that."""
        ...

    async def stats(self) -> EngineStats:
        """A snapshot; where the engine is too busy to answer at once, the latest one."""
        ...

    async def stop(self, drain: float) -> None:
        """Take no new requests, let running ones finish for up to `drain` seconds, abort the rest, free everything."""
        ...
