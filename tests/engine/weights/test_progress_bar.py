from __future__ import annotations

import io

from rich.console import Console

from engine.weights.progress import Progress
from engine.weights.progress_bar import RichProgress


def test_each_work_gets_a_bar_with_its_bytes() -> None:
    screen = io.StringIO()
    with RichProgress(Console(file=screen, force_terminal=True, width=120)) as bars:
        progress: Progress = bars
        progress.start("Fetching x", 4_000_000)
        progress.advance(1_000_000)
        progress.advance(3_000_000)
        progress.done()
        progress.start("Packing x", None)
        progress.advance(500)
        progress.done()
    shown = screen.getvalue()
    assert "Fetching x" in shown
    assert "4.0/4.0 MB" in shown
    assert "Packing x" in shown


def test_nothing_is_drawn_without_work() -> None:
    screen = io.StringIO()
    with RichProgress(Console(file=screen, force_terminal=True, width=120)):
        pass
    assert screen.getvalue().strip() == ""
