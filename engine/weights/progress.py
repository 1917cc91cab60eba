"""How long work reports where it is."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichBars


class Progress(Protocol):
    """Told about one piece of work at a time: `start`, any number of `advance`, `done` (also after a failure)."""

    def start(self, label: str, total_bytes: int | None) -> None:
        """Work named `label` begins; `total_bytes` None: nobody knows how much it is."""
        ...

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` more are done."""
        ...

    def done(self) -> None:
        """The work has ended."""
        ...


class NoProgress:
    """Reports nothing."""

    def start(self, label: str, total_bytes: int | None) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def done(self) -> None:
        pass


class RichProgress:
    """Bars on a terminal, standard error by default. A context manager: the terminal is restored on leaving it."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = RichBars(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task = None

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def start(self, label: str, total_bytes: int | None) -> None:
        # Started with the first work, not on entering: a warm start prints nothing.
        self._bars.start()
        self._task = self._bars.add_task(label, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def done(self) -> None:
        if self._task is not None:
            # A bar of unknown length stops where it is.
            self._bars.update(self._task, total=self._bars.tasks[-1].completed)
            self._task = None
        self._bars.stop()
