"""Our own engine as an Engine: requests go to a process, deltas come back, and a dead process is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.backends.child import Child
from engine.config import EngineConfig
from engine.errors import EngineDeadError, EngineError, EngineOverloadedError, RequestError, SeraphError
from engine.process import Abort, Aborted, Add, Deltas, Embed, Refused, Stats, StatsRequest, ToParent, Vectors
from engine.request import Capabilities, Embedded, EmbedRequest, EngineStats, Request, TokenDelta

logger = logging.getLogger("seraph.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """How patient the parent is with its engine process. Seconds, unless said otherwise."""

    start_timeout: float = 120.0  # from connecting until ready: the model is mapped, not fetched, in that time
    quick_death: float = 30.0  # a process that dies sooner after it was ready died quickly
    max_quick_deaths: int = 5  # in a row; then no new one is started
    backoff: float = 0.25  # before the second restart in a row, doubled for each further one; the first is immediate
    max_backoff: float = 5.0
    restart_wait: float = 10.0  # how long a request that arrives during a restart waits for it
    stats_timeout: float = 0.25  # a busier engine than that is reported by its latest snapshot
    grace: float = 5.0  # between SIGTERM and SIGKILL

    def delay(self, num_quick_deaths: int) -> float:
        """Seconds to wait before the restart that follows this many quick deaths in a row."""
        if num_quick_deaths <= 1:
            return 0.0
        return float(min(self.max_backoff, self.backoff * 2 ** (num_quick_deaths - 2)))


class Inflight:
    """A request in the engine: what has arrived and not been taken, and all that a replay needs."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.received: list[int] = []  # output tokens since the request was sent, taken or not
        self.finished = False  # the engine holds it no longer
        self._pending: list[TokenDelta] = []
        self._error: SeraphError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def as_resumed_request(self) -> Request:
        """The same request as it stands now: given to a fresh engine it continues after the last token received."""
        return msgspec.structs.replace(self.request, output_token_ids=self.request.output_token_ids + self.received)

    def deliver(self, delta: TokenDelta) -> None:
        """Take in what the engine sent. A gap, which would be our bug, fails this request and no other."""
        expected = len(self.request.output_token_ids) + len(self.received)
        if delta.position != expected:
            self._error = EngineError(f"{delta.request_id}: expected position {expected}, got {delta.position}.")
            self._wake()
            return
        self.received += delta.token_ids
        self.finished = delta.finish_reason is not None
        self._pending.append(delta)
        self._wake()

    def fail(self, error: SeraphError) -> None:
        """End it with an exception, after what has arrived."""
        self.finished = True
        self._error = error
        self._wake()

    async def take(self) -> TokenDelta:
        """All that arrived since the last call, as one delta; waits for some. Raises what `fail` was given."""
        if not self._pending and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._pending:
            pending, self._pending = self._pending, []
            return pending[0] if len(pending) == 1 else merge(pending)
        assert self._error is not None
        raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(deltas: list[TokenDelta]) -> TokenDelta:
    """Consecutive deltas of one request as one."""
    last = deltas[-1]
    return TokenDelta(
        request_id=last.request_id,
        position=deltas[0].position,
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[each for delta in deltas for each in delta.logprobs],
        prompt_logprobs=[each for delta in deltas for each in delta.prompt_logprobs],
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        num_cached_tokens=max(delta.num_cached_tokens for delta in deltas),
        error=last.error,
    )


class InflightTexts:
    """Texts in the engine that are to be made vectors."""

    def __init__(self, request: EmbedRequest) -> None:
        self.request = request
        self.finished = False  # the engine holds it no longer
        self._vectors: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()

    def deliver(self, embedded: Embedded) -> None:
        """Take in what the engine sent."""
        self.finished = True
        if not self._vectors.done():
            self._vectors.set_result(embedded)

    def fail(self, error: SeraphError) -> None:
        """End it with an exception."""
        self.finished = True
        if not self._vectors.done():
            self._vectors.set_exception(error)

    async def take(self) -> Embedded:
        """What became of it. Raises what `fail` was given."""
        return await self._vectors


class State(enum.Enum):
    NEW = "has not been started"
    READY = "is ready"
    RESTARTING = "is restarting"
    STOPPING = "is stopping"
    STOPPED = "is stopped"
    FAILED = "died too often and is not started again"


class NativeEngine:
    """`engine.backends.base.Engine` over a supervised engine process.

    If the process dies, requests in flight raise EngineDeadError and a new process is started. Requests that arrive
    meanwhile wait for it up to `Supervision.restart_wait` seconds, then raise EngineOverloadedError. After
    `Supervision.max_quick_deaths` in a row the engine gives up: `alive` turns False and every request raises
    EngineDeadError.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        supervision: Supervision = Supervision(),
        spawn: Callable[[EngineConfig], Child] = Child,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._supervision = supervision
        self._spawn = spawn
        self._clock = clock
        self._state = State.NEW
        self._state_changed = asyncio.Event()  # replaced at each change
        self._child: Child | None = None
        self._capabilities: Capabilities | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._inflight: dict[str, Inflight | InflightTexts] = {}
        self._aborting: set[str] = set()  # ids whose late deltas may still arrive
        self._all_finished = asyncio.Event()
        self._all_finished.set()
        self._latest_stats = EngineStats()
        self._stats_answer: asyncio.Future[EngineStats] | None = None
        self._num_restarts = 0

    @property
    def alive(self) -> bool:
        return self._state in (State.READY, State.RESTARTING, State.STOPPING)

    @property
    def ready(self) -> bool:
        return self._state is State.READY

    @property
    def pid(self) -> int | None:
        """The engine process, where there is one."""
        return None if self._child is None else self._child.pid

    def launch(self) -> None:
        """Start the process now, before there is an event loop; `start` then finds it well under way. Optional.

        The calling thread must outlive the engine.
        """
        assert self._state is State.NEW and self._child is None
        self._child = self._spawn(self._config)

    def kill(self) -> None:
        """Undo a `launch` that no `start` followed. Without effect otherwise."""
        if self._state is State.NEW and self._child is not None:
            self._child.kill()
            self._child = None

    async def start(self) -> None:
        """Wait until the engine process is ready.

        Raises what kept it from starting, as the class it was there (ConfigError, ModelError, ...), and EngineError
        with its exit status and last lines where it just died. The engine can then be started anew.
        """
        assert self._state is State.NEW, f"the engine {self._state.value}"
        await self._start_child()
        self._enter(State.READY)
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(), name="engine-supervisor")

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """See Engine.generate. What arrives between two reads comes as one delta.

        Raises RequestError also for an id that is in use.
        """
        await self._send(request.request_id, Add(request))
        inflight = Inflight(request)
        with self._tracked(inflight):
            while True:
                delta = await inflight.take()
                yield delta
                if delta.finish_reason is not None:
                    return

    async def embed(self, request: EmbedRequest) -> NDArray[np.float32]:
        """See Engine.embed. Raises RequestError also for an id that is in use."""
        await self._send(request.request_id, Embed(request))
        inflight = InflightTexts(request)
        with self._tracked(inflight):
            embedded = await inflight.take()
        if embedded.error is not None:
            raise EngineError(embedded.error)
        return np.frombuffer(embedded.data, "<f4").reshape(len(request.inputs), -1)

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise EngineDeadError(f"The engine {State.NEW.value}.")
        return self._capabilities

    async def stats(self) -> EngineStats:
        """A snapshot; the latest known one where the engine is in a long step, zeros while it is away."""
        if self._child is not None and self._state in (State.READY, State.STOPPING):
            if self._stats_answer is None:
                # One question serves everyone who asks meanwhile, and stays open for whoever asks after a timeout.
                self._stats_answer = asyncio.get_running_loop().create_future()
                with contextlib.suppress(EngineDeadError):
                    self._child.send(StatsRequest())
            await asyncio.wait((self._stats_answer,), timeout=self._supervision.stats_timeout)
        return msgspec.structs.replace(self._latest_stats, num_restarts=self._num_restarts)

    async def stop(self, drain: float) -> None:
        """See Engine.stop. What is still running after `drain` seconds raises EngineDeadError. Idempotent."""
        if self._state in (State.READY, State.RESTARTING):
            self._enter(State.STOPPING)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_finished.wait(), timeout=drain)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
            self._supervisor = None
        await self._end_child()
        self._fail_all(EngineDeadError("The engine was stopped before the request had finished."))
        self._enter(State.STOPPED)

    # --- Requests ---

    async def _send(self, request_id: str, message: Add | Embed) -> None:
        """Give the process a request, and nothing else runs before the caller can track it."""
        child = await self._ready_child()
        if request_id in self._inflight or request_id in self._aborting:
            raise RequestError(f"request_id {request_id!r} is in use.", param="request_id")
        try:
            child.send(message)
        except (OverflowError, TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"The request cannot be encoded: {error}.") from error

    async def _ready_child(self) -> Child:
        """The process that takes a request now. Raises EngineOverloadedError or EngineDeadError where there is none."""
        if self._state is State.RESTARTING:
            wait = self._supervision.restart_wait
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    while self._state is State.RESTARTING:
                        await self._state_changed.wait()
            if self._state is State.RESTARTING:
                raise EngineOverloadedError(f"The engine is restarting; it was not ready after {wait:g} s.")
        if self._state is not State.READY:
            raise EngineDeadError(f"The engine {self._state.value}.")
        assert self._child is not None
        return self._child

    @contextlib.contextmanager
    def _tracked(self, inflight: Inflight | InflightTexts) -> Iterator[None]:
        """What the engine says reaches it while this is entered; left before its end, it is aborted."""
        request_id = inflight.request.request_id
        self._inflight[request_id] = inflight
        self._all_finished.clear()
        try:
            yield
        finally:
            del self._inflight[request_id]
            if not self._inflight:
                self._all_finished.set()
            if not inflight.finished and self._child is not None:
                with contextlib.suppress(EngineDeadError):
                    self._child.send(Abort(request_id))
                    self._aborting.add(request_id)

    def _dispatch(self, message: ToParent) -> None:
        match message:
            case Deltas(deltas):
                for delta in deltas:
                    if isinstance(inflight := self._inflight.get(delta.request_id), Inflight):
                        inflight.deliver(delta)
            case Vectors(embedded):
                if isinstance(texts := self._inflight.get(embedded.request_id), InflightTexts):
                    texts.deliver(embedded)
            case Refused(request_id, fault):
                if (refused := self._inflight.get(request_id)) is not None:
                    refused.fail(fault.to_error())
            case Aborted(request_id):
                self._aborting.discard(request_id)
            case Stats(stats):
                self._latest_stats = stats
                if self._stats_answer is not None:
                    self._stats_answer.set_result(stats)
                    self._stats_answer = None
            case _:
                logger.error("the engine process said %s when it was already running", type(message).__name__)

    def _fail_all(self, error: SeraphError) -> None:
        for inflight in self._inflight.values():
            if not inflight.finished:
                inflight.fail(error)

    # --- The process ---

    async def _start_child(self) -> None:
        if self._child is None:
            self._child = self._spawn(self._config)
        try:
            self._capabilities = await self._child.connect(self._dispatch, self._supervision.start_timeout)
        except BaseException:
            await self._end_child()
            raise

    async def _end_child(self) -> None:
        """End and forget the process and all that was known of its state."""
        child, self._child = self._child, None
        if child is not None:
            await child.end(self._supervision.grace)
        self._aborting.clear()
        self._latest_stats = EngineStats()
        if self._stats_answer is not None:
            self._stats_answer.cancel()
            self._stats_answer = None

    async def _supervise(self) -> None:
        """Replace the process whenever it dies, until that happens too often in too short a time."""
        num_quick_deaths = 0
        while True:
            assert self._child is not None
            ready_since = self._clock()
            await self._child.wait()
            quick = self._clock() - ready_since < self._supervision.quick_death
            num_quick_deaths = num_quick_deaths + 1 if quick else 1
            how = self._child.describe_exit()
            logger.error("the engine process %s with %d requests in flight", how, len(self._inflight))
            if self._state is State.READY:  # a stop that is draining goes on: it has nothing left to wait for
                self._enter(State.RESTARTING)
            self._fail_all(EngineDeadError(f"The engine process {how} while it held the request."))
            await self._end_child()
            if self._state is State.STOPPING:
                return
            while True:
                if num_quick_deaths >= self._supervision.max_quick_deaths:
                    logger.critical("the engine process died %d times in a row: giving up", num_quick_deaths)
                    self._enter(State.FAILED)
                    return
                await asyncio.sleep(self._supervision.delay(num_quick_deaths))
                try:
                    await self._start_child()
                except SeraphError as error:
                    logger.error("the engine process could not be started again: %s", error)
                    num_quick_deaths += 1
                else:
                    break
            self._num_restarts += 1
            logger.info("a new engine process (%d) is ready", self._child.pid)
            self._enter(State.READY)

    def _enter(self, state: State) -> None:
        self._state = state
        changed, self._state_changed = self._state_changed, asyncio.Event()
        changed.set()
