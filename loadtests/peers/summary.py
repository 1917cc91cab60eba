"""Medians and ratios of what was measured. Ratios are of pairs: ours and the peer's of the same round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.peers.plan import OURS
from loadtests.peers.records import Results


@dataclass(frozen=True, slots=True)
class Middle:
    """The median of so many values, and the range of them."""

    median: float
    low: float
    high: float
    count: int


def middle(values: Sequence[float]) -> Middle | None:
    """None where there are no values."""
    if not values:
        return None
    return Middle(statistics.median(values), min(values), max(values), len(values))


def values(results: Results, system: str, task: str, figure: str, *, pair: str | None = None) -> list[float]:
    """A figure of a system in the order of measurement; of ours in one pair, or in all."""
    return [
        one.figures[figure]
        for one in results.measurements
        if (one.system, one.task) == (system, task) and figure in one.figures and pair in (None, one.pair)
    ]


def pairs(results: Results, peer: str, task: str, figure: str) -> list[tuple[float, float]]:
    """(ours, theirs) of each round that has both."""
    found: dict[int, dict[str, float]] = {}
    for one in results.measurements:
        if (one.pair, one.task) == (peer, task) and figure in one.figures:
            found.setdefault(one.round, {})[one.system] = one.figures[figure]
    return [(both[OURS], both[peer]) for _, both in sorted(found.items()) if len(both) == 2]


def ratio(results: Results, peer: str, task: str, figure: str = "tokens_per_second") -> Middle | None:
    """How many times the peer's figure ours is: the median over the pairs, not the ratio of the medians."""
    return middle([ours / theirs for ours, theirs in pairs(results, peer, task, figure) if theirs > 0])


def per_setting(results: Results, system: str, task: str) -> str:
    """The settings that a task was measured with, named once each."""
    labels = (one.setting for one in results.measurements if (one.system, one.task) == (system, task))
    return " / ".join(dict.fromkeys(labels))
