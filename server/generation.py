"""The choices of one HTTP request while the engine writes them: tokens in, text out, usage, failure, abort."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from starlette.types import Receive

from engine.backends.base import Engine
from engine.errors import EngineDeadError, EngineError
from engine.request import FinishReason, Request, TokenDelta
from server.errors import ClientDisconnectedError, DeadlineError
from server.metrics import ModelMetrics
from server.schemas.common import Usage, usage

Stop = Literal["stop", "length"]
"""The API's finish reasons of an answer that is complete."""


class TextStream(Protocol):
    """Text of one choice, token by token."""

    @property
    def stopped(self) -> bool:
        """A stop string was found: nothing more will come, and nothing more may be pushed."""
        ...

    def push(self, token_id: int) -> str:
        """Text that is certain by now: whole characters that no stop string can still take back."""
        ...

    def flush(self) -> str:
        """The text held back so far; the tokens have ended. May find a stop string."""
        ...


class Text(Protocol):
    """What handlers need of a model's text side (`engine.text.ModelText`). Encoding may be called from any thread."""

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        ...

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """Token ids of a conversation, by default ready for the assistant's turn; `arguments` are the template's.

        Raises RequestError where it cannot be rendered."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a plain text; special-token text inside it is plain text too."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out or, without `skip_special`, written as they are."""
        ...

    def stream(
        self, stop: Sequence[str], min_tokens: int, *, include_stop: bool = False, skip_special: bool = True
    ) -> TextStream:
        """A stream for one choice. Stop strings that end within the first `min_tokens` tokens do not count.

        The one that ends it is shown with `include_stop`, special tokens are without `skip_special`."""
        ...

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        ...

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of words that an answer may not hold, as SamplingParams takes them."""
        ...


@dataclass(slots=True)
class Choice:
    """One sequence and what has become of it."""

    index: int  # in the answer
    request: Request
    text: TextStream
    num_tokens: int = 0  # delivered
    num_cached_tokens: int = 0  # of the prompt
    first_token_at: float = 0.0
    last_token_at: float = 0.0


@dataclass(slots=True)
class Piece:
    """What one choice gained since the last look."""

    index: int
    text: str = ""
    finish_reason: Stop | None = None


@dataclass(slots=True)
class Answer:
    """One choice, whole."""

    text: str = ""
    finish_reason: Stop = "stop"


class Generation:
    """Runs the choices of one request; leaving the context aborts what still runs.

    A caller that disconnects (`receive` says so) is a failure like any other: `pieces` raises it, at once.
    """

    def __init__(
        self,
        engine: Engine,
        choices: Sequence[Choice],
        *,
        receive: Receive,
        metrics: ModelMetrics,
        arrived: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._choices = choices
        self._receive = receive
        self._metrics = metrics
        self._arrived = arrived
        self._clock = clock
        self._pending: dict[int, Piece] = {}
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._num_live = len(choices)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run(choice)) for choice in self._choices]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def is_done(self) -> bool:
        """Every choice has ended and nothing of them waits to be taken."""
        return not self._num_live and not self._pending

    async def pieces(self, patience: float | None = None) -> list[Piece]:
        """What came since the last call, one piece per choice; waits for it, at most `patience` seconds.

        An empty list means that the patience ran out. Raises what the engine raised, or ClientDisconnectedError.
        """
        if not self._pending and self._failure is None:
            self._changed.clear()
            timer = None
            if patience is not None:
                timer = asyncio.get_running_loop().call_later(patience, self._changed.set)
            await self._changed.wait()
            if timer is not None:
                timer.cancel()
        if self._failure is not None and (not self._pending or isinstance(self._failure, ClientDisconnectedError)):
            raise self._failure
        pending, self._pending = self._pending, {}
        return list(pending.values())

    def usage(self) -> Usage:
        """Tokens so far. A prompt counts once, however many choices continue it."""
        firsts = [choice for choice in self._choices if choice.request.choice_index == 0]
        return usage(
            prompt_tokens=sum(len(choice.request.prompt_token_ids) for choice in firsts),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in firsts),
        )

    def time_to_first_token(self) -> float | None:
        """Seconds from the request's arrival to the first token of any choice; None while there is none."""
        firsts = [choice.first_token_at for choice in self._choices if choice.first_token_at]
        return min(firsts) - self._arrived if firsts else None

    @property
    def answer_id(self) -> str:
        """What the engine's request ids begin with."""
        return self._choices[0].request.request_id.rpartition("-")[0]

    async def _run(self, choice: Choice) -> None:
        deltas = self._engine.generate(choice.request)
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if self._take(choice, delta):
                        return
            raise EngineError(f"request {choice.request.request_id}: the engine's deltas ended without a reason")
        except Exception as error:
            self._fail(error)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientDisconnectedError("The caller disconnected."))

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._changed.set()

    def _take(self, choice: Choice, delta: TokenDelta) -> bool:
        """Turn a delta into text; True when the choice has ended."""
        reason = _reason(delta)
        choice.num_cached_tokens = delta.num_cached_tokens or choice.num_cached_tokens
        num_before, text, stream = choice.num_tokens, "", choice.text
        for token_id in delta.token_ids:
            choice.num_tokens += 1
            ends = delta.stop_token_id is not None and choice.num_tokens == delta.position + len(delta.token_ids)
            if ends and not choice.request.sampling.include_stop_str_in_output:
                break  # the token that ended the answer is counted and not shown
            text += stream.push(token_id)
            if stream.stopped:
                reason = "stop"
                break
        if reason is not None and not stream.stopped:
            text += stream.flush()
            reason = "stop" if stream.stopped else reason
        self._observe(choice, choice.num_tokens - num_before, reason)
        if text or reason is not None:
            piece = self._pending.get(choice.index)
            if piece is None:
                piece = self._pending[choice.index] = Piece(choice.index)
            piece.text += text
            piece.finish_reason = reason
            if reason is not None:
                self._num_live -= 1
            self._changed.set()
        return reason is not None

    def _observe(self, choice: Choice, num_new: int, reason: str | None) -> None:
        metrics = self._metrics
        if num_new:
            now = self._clock()
            if not choice.first_token_at:
                choice.first_token_at = now
                metrics.time_to_first_token.observe(now - self._arrived)
            else:
                metrics.inter_token_latency.observe((now - choice.last_token_at) / num_new)
            choice.last_token_at = now
        if reason is not None:
            metrics.count_finished(reason)
            metrics.completion_tokens.inc(choice.num_tokens)
            if choice.num_tokens > 1:
                seconds = choice.last_token_at - choice.first_token_at
                metrics.time_per_output_token.observe(seconds / (choice.num_tokens - 1))
            if choice.request.choice_index == 0:
                metrics.prompt_tokens.inc(len(choice.request.prompt_token_ids))
                metrics.cached_tokens.inc(choice.num_cached_tokens)


def _reason(delta: TokenDelta) -> Stop | None:
    """The API's finish reason; raises what the engine's other reasons stand for."""
    match delta.finish_reason:
        case None:
            return None
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case FinishReason.ABORT:
            raise EngineDeadError("The server stopped before the answer was complete.")
        case FinishReason.DEADLINE:
            raise DeadlineError("The request's deadline passed before the answer was complete.")
        case FinishReason.ERROR:
            raise EngineError(delta.error or "the engine gave no reason")
