"""The choices of one HTTP request while the engine writes them: tokens in, text out, usage, failure, abort."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from starlette.types import Receive

from engine.backends.base import Engine
from engine.errors import EngineDeadError, EngineError, RequestError
from engine.request import FinishReason, Request, TokenDelta, TokenLogprobs
from engine.text.tool_formats import ToolFormat
from server.errors import ClientDisconnectedError, DeadlineError
from server.metrics import ModelMetrics
from server.schemas.common import Usage, usage
from server.schemas.logprobs import ScoredToken

Stop = Literal["stop", "length"]
"""The API's finish reasons of an answer that is complete."""


class TextStream(Protocol):
    """Text of one choice, token by token."""

    @property
    def stopped(self) -> bool:
        """A stop string was found: nothing more will come, and nothing more may be pushed."""
        ...

    @property
    def num_characters(self) -> int:
        """Characters of all tokens pushed, given out or not."""
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

    @property
    def tool_format(self) -> ToolFormat | None:
        """How calls of tools are written; None without a chat template."""
        ...

    @property
    def reasons(self) -> bool:
        """Whether answers may begin with reasoning."""
        ...

    @property
    def marker_ids(self) -> Mapping[str, int]:
        """Ids of those of the texts around calls and reasoning that are special tokens."""
        ...

    def begins_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the start of reasoning, which its answer then goes on with."""
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

    def token_bytes(self, token_id: int) -> bytes:
        """What a token contributes to text, which may be part of a character."""
        ...

    def stream(
        self,
        stop: Sequence[str],
        min_tokens: int,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        show_markers: bool = False,
    ) -> TextStream:
        """A stream for one choice. Stop strings that end within the first `min_tokens` tokens do not count.

        The one that ends it is shown with `include_stop`, special tokens are without `skip_special`, those around
        calls of tools and reasoning with `show_markers`."""
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
    keeps_token_ids: bool = False
    num_tokens: int = 0  # delivered
    num_cached_tokens: int = 0  # of the prompt
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    num_characters: int = 0  # of text, given out
    waiting: list[tuple[ScoredToken, int]] = field(default_factory=list)  # tokens whose text may be held, and its end
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # for the next piece


@dataclass(slots=True)
class Piece:
    """What one choice gained since the last look."""

    index: int
    text: str = ""
    finish_reason: Stop | None = None
    token_ids: list[int] = field(default_factory=list)  # all that were chosen, with those whose text is held or cut off
    tokens: list[ScoredToken] = field(default_factory=list)  # those of the text, where log-probabilities are wanted
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # in the first piece, where they are wanted


@dataclass(slots=True)
class Answer:
    """One choice, whole."""

    text: str = ""
    finish_reason: Stop = "stop"
    token_ids: list[int] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Take what the choice gained."""
        self.text += piece.text
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.token_ids += piece.token_ids
        self.tokens += piece.tokens
        self.prompt_logprobs += piece.prompt_logprobs


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
        self._patience_ends = math.inf  # of the caller who waits, by the loop's clock
        self._timer: asyncio.TimerHandle | None = None
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
        if self._timer is not None:
            self._timer.cancel()
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
            if patience is not None:
                self._be_patient(patience)
            await self._changed.wait()
            self._patience_ends = math.inf
        if self._failure is not None and (not self._pending or isinstance(self._failure, ClientDisconnectedError)):
            raise self._failure
        pending, self._pending = self._pending, {}
        return list(pending.values())

    def _be_patient(self, seconds: float) -> None:
        """Have the wait end after so long. One timer for many waits, since nearly all of them end by a token."""
        loop = asyncio.get_running_loop()
        self._patience_ends = loop.time() + seconds
        if self._timer is None:
            self._timer = loop.call_later(seconds, self._look_at_the_time)

    def _look_at_the_time(self) -> None:
        self._timer = None
        left = self._patience_ends - asyncio.get_running_loop().time()
        if left <= 0:
            self._changed.set()
        elif left < math.inf:
            self._be_patient(left)

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
        choice.prompt_logprobs += delta.prompt_logprobs
        num_before, text, stream = choice.num_tokens, "", choice.text
        scored = iter(delta.logprobs)
        for token_id in delta.token_ids:
            choice.num_tokens += 1
            ends = delta.stop_token_id is not None and choice.num_tokens == delta.position + len(delta.token_ids)
            if ends and not choice.request.sampling.include_stop_str_in_output:
                break  # the token that ended the answer is counted and not shown
            start = stream.num_characters
            text += stream.push(token_id)
            if (logprobs := next(scored, None)) is not None:
                choice.waiting.append((ScoredToken(logprobs, start), stream.num_characters))
            if stream.stopped:
                reason = "stop"
                break
        if reason is not None and not stream.stopped:
            text += stream.flush()
            reason = "stop" if stream.stopped else reason
        num_new = choice.num_tokens - num_before
        self._observe(choice, num_new, reason)
        choice.num_characters += len(text)
        tokens = _certain(choice, ended=reason is not None) if choice.waiting else []
        token_ids = delta.token_ids[:num_new] if choice.keeps_token_ids else []
        if text or tokens or token_ids or reason is not None:
            piece = self._pending.get(choice.index)
            if piece is None:
                piece = self._pending[choice.index] = Piece(choice.index)
            piece.text += text
            piece.tokens += tokens
            piece.token_ids += token_ids
            piece.prompt_logprobs += choice.prompt_logprobs
            choice.prompt_logprobs = []
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


def _certain(choice: Choice, *, ended: bool) -> list[ScoredToken]:
    """Take the tokens whose text has been given out; at the end also those that a stop string has cut in two."""
    waiting, given = choice.waiting, choice.num_characters
    if not ended:
        num_certain = next((i for i, (_, end) in enumerate(waiting) if end > given), len(waiting))
    elif choice.text.stopped:
        num_certain = next((i for i, (token, _) in enumerate(waiting) if token.offset >= given), len(waiting))
    else:
        num_certain = len(waiting)
    choice.waiting = waiting[num_certain:]
    return [token for token, _ in waiting[:num_certain]]


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
        case FinishReason.REFUSED:
            raise RequestError(delta.error or "the engine gave no reason", code="no_token_allowed")
        case FinishReason.ERROR:
            raise EngineError(delta.error or "the engine gave no reason")
