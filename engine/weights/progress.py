"""How long work reports where it is. `engine.weights.progress_bar` shows it on a terminal."""

from __future__ import annotations

from typing import Protocol


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
