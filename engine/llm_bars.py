"""How far offline work is, on standard error, and Ctrl-C that waits until the books are in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from engine.request import FinishReason, Request

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

REFRESH_SECONDS = 0.1
"""Between two looks at a progress bar: counting a large batch takes longer than many a step."""


class Stream(Protocol):
    """What a bar counts of a request that is being answered."""

    request: Request
    token_ids: list[int]
    finish_reason: FinishReason | None


class _Bar:
    """A bar that is there for the length of a `with` block. Ctrl-C finds it whole, or not there yet."""

    _bar: Progress

    def __enter__(self) -> Self:
        with interrupts_deferred():
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        with interrupts_deferred():
            self._bar.stop()


class GenerationBar(_Bar):
    """How far a batch is, on standard error: prompts done, tokens, tokens a second, time to go at that rate.

    How long an answer becomes nobody knows before its end: until then it counts with the most that it may have.
    """

    def __init__(
        self, streams: Sequence[Stream], max_model_len: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._streams, self._max_model_len, self._clock = streams, max_model_len, clock
        self._started = self._shown = clock()
        self._bar = Progress(
            TextColumn("generating"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            auto_refresh=False,  # by a thread that may outlive the bar; there are updates enough
        )
        self._task: TaskID = self._bar.add_task(f"0/{len(streams)}", total=None)

    def update(self, *, last: bool) -> None:
        """Show what has changed, where that was not done just now or this is the `last` time."""
        now = self._clock()
        if last or now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            done, tokens, expected = self._count()
            said = describe(done, len(self._streams), tokens, expected, now - self._started)
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


def describe(done: int, of: int, tokens: int, expected: int, seconds: float) -> str:
    rate = tokens / seconds if seconds > 0 else 0.0
    text = f"{done}/{of}, {tokens} tokens, {rate:,.0f} tokens/s"
    if done == of:
        return f"{text}, {timedelta(seconds=round(seconds))}"
    return f"{text}, {timedelta(seconds=round((expected - tokens) / rate))} to go" if rate else text


class TextsBar(_Bar):
    """How many of a number of texts are vectors already."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("embedding"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            auto_refresh=False,  # by a thread that may outlive the bar
        )
        self._task: TaskID = self._bar.add_task("", total=total)

    def update(self, done: int) -> None:
        """Show that so many are done."""
        self._bar.update(self._task, completed=done, refresh=True)


@contextmanager
def loading_bars(progress: bool) -> Iterator[Any]:
    """What load_model reports to: bars, or None."""
    if not progress:
        yield None
        return
    from engine.weights.progress_bar import RichProgress

    with RichProgress() as bars:
        yield bars


@contextmanager
def interrupts_deferred() -> Iterator[None]:
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
