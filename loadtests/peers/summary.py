"""Medians and ratios of what was measured. Ratios are of pairs: ours and the peer's of the same round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.peers.plan import OURS
from loadtests.peers.records import Results

T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120),
    *(2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Quantiles of Student's t distribution for a two-sided interval of 95 %, for 1, 2, ... 30 degrees of freedom."""


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


@dataclass(frozen=True, slots=True)
class Interval:
    """The geometric mean of so many ratios, and the interval that holds the true one with 95 % confidence."""

    mean: float
    low: float
    high: float
    count: int


def interval(ratios: Sequence[float]) -> Interval | None:
    """By Student's t distribution of the ratios' logarithms. None where there are fewer than two."""
    count = len(ratios)
    if count < 2:
        return None
    logs = [math.log(one) for one in ratios]
    mean = statistics.fmean(logs)
    half = T_95[min(count - 1, len(T_95)) - 1] * statistics.stdev(logs) / math.sqrt(count)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), count)


def per_setting(results: Results, system: str, task: str) -> str:
    """The settings that a task was measured with, named once each."""
    labels = (one.setting for one in results.measurements if (one.system, one.task) == (system, task))
    return " / ".join(dict.fromkeys(labels))
