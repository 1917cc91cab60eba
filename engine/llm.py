"""Offline use, without a server or another process:

with LLM() as llm:
    for completion in llm.chat([{"role": "user", "content": "What is the capital of France?"}]):
        print(completion.text)
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

from engine.config import DEFAULT_MODEL, EngineConfig
from engine.core import EngineCore
from engine.errors import EngineError, RequestError
from engine.request import FinishReason, Request, SamplingParams, TokenDelta
from engine.text import Detokenizer, ModelText
from engine.weights import load_model

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Prompt: TypeAlias = "str | Sequence[int]"
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
Sampling: TypeAlias = "SamplingParams | Sequence[SamplingParams]"

REFRESH_SECONDS = 0.1
"""Between two looks at a progress bar: counting a large batch takes longer than many a step."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt."""

    text: str  # without the stop string, the stop token and other special tokens
    token_ids: list[int]  # everything the model chose, the stop token included
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache


class LLM:
    """A model in this process. Close it, or use it as a context manager.

    `model` is an alias or a source as `seraph serve` takes it; `config` are fields of EngineConfig. A prompt is text,
    which gets the model's BOS, or token ids, which are taken as they are. Raises ConfigError or ModelError for what
    cannot be loaded, RequestError for a prompt or parameter that cannot be used, EngineError if a kernel fails.

    Ctrl-C stops a call after the step under way and leaves none of its requests behind; the LLM stays usable. Calls may
    come from several threads: each computes the steps that it waits for, and a step is one for the requests of all.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, progress: bool = True, **config: Any) -> None:
        self.config = EngineConfig(model=model, **config)
        with _loading_bars(progress) as bars:
            self._model = load_model(
                self.config.model, home=self.config.home, progress=bars, **self.config.load_options()
            )
        self.name = self._model.name
        try:
            self.text = ModelText.from_info(self._model.info)
            self._core: EngineCore | None = EngineCore(self.config, self._model)
        except BaseException:
            self._model.close()
            raise
        self._serial = itertools.count()
        self._live: dict[str, _Stream] = {}
        # Reentrant: a stream that nobody holds any more may be collected, and aborted, while the engine is at work.
        self._lock = threading.RLock()
        self._at_work = False
        self._dropped: list[_Stream] = []  # to be aborted when it is not

    def default_sampling(self) -> SamplingParams:
        """How a call without `sampling` samples: as the model's checkpoint or the catalogue says. The rest is unset."""
        return SamplingParams.from_defaults(self._model.info.generation_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> list[Completion]:
        """Continue one prompt or many, as one batch; one completion a prompt, in order.

        `sampling` is one SamplingParams for all prompts or one for each; None stands for `default_sampling()`. `seed`
        makes the draws: prompt i uses seed + i, so a call repeated gives the same tokens.
        """
        return self._complete([self._encode(prompt) for prompt in _as_prompts(prompts)], sampling, seed, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> list[Completion]:
        """The next assistant message of one conversation or many; otherwise as `generate`.

        A conversation is a list of {"role": ..., "content": ...} messages, rendered by the model's own chat template.
        """
        prompts = [self.text.encode_chat(conversation) for conversation in _as_conversations(conversations)]
        return self._complete(prompts, sampling, seed, progress)

    def stream(
        self, prompt: Prompt | Conversation, sampling: SamplingParams | None = None, *, seed: int = 0
    ) -> Generator[str, None, None]:
        """The text of one answer, piece by piece as it becomes certain.

        The request starts when the first piece is asked for; closing the generator aborts it.
        """
        if _is_conversation(prompt):
            token_ids = self.text.encode_chat(prompt)
        else:
            token_ids = self._encode(cast("Prompt", prompt))
        return self._pieces(token_ids, sampling or self.default_sampling(), seed)

    def close(self) -> None:
        """Free the KV memory, the threads and the weights. Idempotent."""
        with _interrupts_deferred(), self._lock:
            core, self._core = self._core, None
            if core is not None:
                self._live.clear()
                core.close()
                self._model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)

    # Running

    def _complete(
        self, prompts: list[list[int]], sampling: Sampling | None, seed: int, progress: bool
    ) -> list[Completion]:
        sampling = self.default_sampling() if sampling is None else sampling
        streams: list[_Stream] = []
        try:
            self._start(streams, prompts, _one_for_each(sampling, len(prompts)), seed)
            with _Bar(streams, self._open_core().max_model_len) if progress and streams else nullcontext() as bar:
                waiting = streams
                while waiting:
                    self._step()
                    waiting = [stream for stream in waiting if stream.finish_reason is None]
                    if bar is not None:
                        bar.update(last=not waiting)
            return [stream.completion() for stream in streams]
        finally:
            self._abort(streams)

    def _pieces(self, prompt: list[int], sampling: SamplingParams, seed: int) -> Generator[str, None, None]:
        # Started in here, because a generator that nobody ever asks is closed without running its `finally`.
        streams: list[_Stream] = []
        try:
            self._start(streams, [prompt], [sampling], seed)
            (stream,) = streams
            while True:
                while stream.finish_reason is None and not stream.pieces:
                    self._step()
                # Another call's steps may have brought pieces, and the end, while this iterator was not asked.
                text = "".join(stream.pieces)
                stream.pieces.clear()
                if text:
                    yield text
                elif stream.finish_reason is not None:
                    stream.check()
                    return
        finally:
            self._abort(streams)

    def _start(
        self, streams: list[_Stream], prompts: list[list[int]], sampling: Sequence[SamplingParams], seed: int
    ) -> None:
        """Add a request for each prompt to the engine and to `streams`, which the caller aborts whatever happens."""
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            request = Request(
                request_id=f"llm-{next(self._serial)}",
                model=self.name,
                prompt_token_ids=prompt,
                sampling=params,
                seed=(seed + index) % 2**64,
            )
            stream = _Stream(request, self.text.stream(_stop_strings(params), params.min_tokens))
            streams.append(stream)
            with self._engine() as core:
                core.add(request)
                self._live[request.request_id] = stream

    def _step(self) -> None:
        """One step for everybody."""
        with self._engine() as core:
            for delta in core.step():
                stream = self._live[delta.request_id]
                stream.receive(delta)
                if stream.finish_reason is not None:
                    del self._live[delta.request_id]
                    core.abort(delta.request_id)  # a stop string: the engine would go on

    def _abort(self, streams: list[_Stream]) -> None:
        with _interrupts_deferred(), self._lock:
            self._dropped += streams
            if not self._at_work and self._core is not None:
                with self._engine():
                    pass

    @contextmanager
    def _engine(self) -> Iterator[EngineCore]:
        """The engine, for this thread alone and without interrupts; at the end it forgets what was dropped."""
        with _interrupts_deferred(), self._lock:
            core, self._at_work = self._open_core(), True
            try:
                yield core
            finally:
                while self._dropped:
                    request_id = self._dropped.pop().request.request_id
                    if self._live.pop(request_id, None) is not None:
                        core.abort(request_id)
                self._at_work = False

    def _open_core(self) -> EngineCore:
        if self._core is None:
            raise EngineError("This LLM is closed.")
        return self._core


@dataclass(slots=True, eq=False)
class _Stream:
    """One request's way from tokens to text."""

    request: Request
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    def receive(self, delta: TokenDelta) -> None:
        self.num_cached_tokens, self.error = delta.num_cached_tokens, delta.error
        for token in delta.token_ids:
            self.token_ids.append(token)
            if delta.stop_token_id is None or token is not delta.token_ids[-1]:
                self._gain(self.detokenizer.push(token))
                if self.detokenizer.stopped:
                    self.finish_reason = FinishReason.STOP
                    return
        if delta.finish_reason is not None:
            self._gain(self.detokenizer.flush())
            self.finish_reason = FinishReason.STOP if self.detokenizer.stopped else delta.finish_reason

    def completion(self) -> Completion:
        """The whole. Raises EngineError if the engine failed the request."""
        self.check()
        assert self.finish_reason is not None
        return Completion(
            text="".join(self.pieces),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
        )

    def check(self) -> None:
        if self.finish_reason is FinishReason.ERROR:
            raise EngineError(self.error or "The engine failed the request.")

    def _gain(self, text: str) -> None:
        if text:
            self.pieces.append(text)


class _Bar:
    """How far a batch is, on standard error: prompts done, tokens, tokens a second, time to go at that rate.

    How long an answer becomes nobody knows before its end: until then it counts with the most that it may have.
    """

    def __init__(
        self, streams: Sequence[_Stream], max_model_len: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._streams, self._max_model_len, self._clock = streams, max_model_len, clock
        self._started = self._shown = clock()
        self._bar: Progress = Progress(
            TextColumn("generating"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            auto_refresh=False,  # by a thread that may outlive the bar; there are updates enough
        )
        self._task: TaskID = self._bar.add_task(f"0/{len(streams)}", total=None)

    def __enter__(self) -> _Bar:
        with _interrupts_deferred():
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with _interrupts_deferred():
            self._bar.stop()

    def update(self, *, last: bool) -> None:
        """Show what has changed, where that was not done just now or this is the `last` time."""
        now = self._clock()
        if last or now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            done, tokens, expected = self._count()
            said = _describe(done, len(self._streams), tokens, expected, now - self._started)
            self._bar.update(self._task, completed=tokens, total=expected, description=said, refresh=True)

    def _count(self) -> tuple[int, int, int]:
        """Streams that are done, tokens, and the tokens expected in the end."""
        done = tokens = expected = 0
        for stream in self._streams:
            ended = stream.finish_reason is not None
            done += ended
            tokens += len(stream.token_ids)
            room = self._max_model_len - len(stream.request.prompt_token_ids)
            asked = stream.request.sampling.max_tokens
            expected += len(stream.token_ids) if ended else room if asked is None else min(asked, room)
        return done, tokens, expected


def _describe(done: int, of: int, tokens: int, expected: int, seconds: float) -> str:
    rate = tokens / seconds if seconds > 0 else 0.0
    text = f"{done}/{of}, {tokens} tokens, {rate:,.0f} tokens/s"
    if done == of:
        return f"{text}, {timedelta(seconds=round(seconds))}"
    return f"{text}, {timedelta(seconds=round((expected - tokens) / rate))} to go" if rate else text


@contextmanager
def _loading_bars(progress: bool) -> Iterator[Any]:
    """What load_model reports to: bars, or None."""
    if not progress:
        yield None
        return
    from engine.weights.progress_bar import RichProgress

    with RichProgress() as bars:
        yield bars


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the engine's books are in order again: at most one step.

    Signals reach the main thread only, and only it can set handlers, so elsewhere there is nothing to do.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught:
            before(*caught[0])


def _stop_strings(params: SamplingParams) -> tuple[str, ...]:
    if not all(params.stop):
        raise RequestError("stop strings must not be empty.", param="stop")
    return params.stop


def _one_for_each(sampling: Sampling, count: int) -> Sequence[SamplingParams]:
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise RequestError(
            f"sampling must be one or one for each of {count} prompts, got {len(sampling)}.", param="sampling"
        )
    return sampling


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    many = list(cast("Sequence[Prompt]", prompts))
    for index, prompt in enumerate(many):
        if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
            raise RequestError(f"prompt {index} must be a string or a list of token ids.", param="prompt")
    return many


def _is_conversation(value: object) -> TypeGuard[Conversation]:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _as_conversations(conversations: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if _is_conversation(conversations):
        return [conversations]
    return list(cast("Sequence[Conversation]", conversations))
