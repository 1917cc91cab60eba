"""A Progress that tests look at, and run things from."""

from __future__ import annotations

from collections.abc import Callable


class Recorded:
    """Keeps what it was told: for each piece of work its label, its total and the bytes that were reported."""

    def __init__(self, on_advance: Callable[[], None] = lambda: None) -> None:
        self.work: list[tuple[str, int | None, int]] = []
        self.open = 0
        self._on_advance = on_advance

    def start(self, label: str, total_bytes: int | None) -> None:
        assert self.open == 0, "one piece of work at a time"
        self.open = 1
        self.work.append((label, total_bytes, 0))

    def advance(self, num_bytes: int) -> None:
        assert self.open == 1
        assert num_bytes > 0
        label, total, seen = self.work[-1]
        self.work[-1] = (label, total, seen + num_bytes)
        self._on_advance()

    def done(self) -> None:
        assert self.open == 1
        self.open = 0
