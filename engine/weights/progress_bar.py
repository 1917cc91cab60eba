"""Progress as bars on a terminal. Apart from `progress`, so that only those who show bars import rich."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class RichProgress:
    """A `Progress` that draws one bar per piece of work, on standard error by default.

    A context manager: leaving it restores the terminal. A start with nothing to do draws nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def start(self, label: str, total_bytes: int | None) -> None:
        # Drawing starts with the first work, not on entering: a warm start has none.
        self._bars.start()
        self._task = self._bars.add_task(label, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def done(self) -> None:
        if self._task is not None:
            self._bars.stop_task(self._task)
            self._task = None
