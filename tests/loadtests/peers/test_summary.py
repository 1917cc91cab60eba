from __future__ import annotations

import math

import pytest

from loadtests.peers import summary
from loadtests.peers.plan import OURS
from loadtests.peers.records import Results
from loadtests.peers.summary import Middle
from tests.loadtests.peers.fixtures import header, measurement, results


def test_the_middle_of_values() -> None:
    assert summary.middle([]) is None
    assert summary.middle([3.0]) == Middle(3.0, 3.0, 3.0, 1)
    assert summary.middle([4.0, 1.0, 2.0]) == Middle(2.0, 1.0, 4.0, 3)
    assert summary.middle([4.0, 1.0]) == Middle(2.5, 1.0, 4.0, 2)


def test_a_ratio_is_the_median_of_the_pairs_ratios() -> None:
    """The machine was ten times slower in the second round: the ratio of the medians would be 1, not 3."""
    found = Results(header())
    for number, (ours, theirs) in enumerate([(300.0, 100.0), (30.0, 10.0), (100.0, 30.0)]):
        found.add(measurement(number, "vllm", OURS, "decode-1", {"tokens_per_second": ours}))
        found.add(measurement(number, "vllm", "vllm", "decode-1", {"tokens_per_second": theirs}))
    ratio = summary.ratio(found, "vllm", "decode-1")
    assert ratio is not None and ratio.median == pytest.approx(3.0) and ratio.count == 3


def test_a_round_without_both_does_not_count() -> None:
    found = results()
    assert summary.pairs(found, "vllm", "decode-1", "tokens_per_second") == [(300.0, 100.0), (200.0, 100.0)]
    assert summary.pairs(found, "llamacpp", "decode-1", "tokens_per_second")[-1] == (400.0, 100.0)
    assert summary.ratio(found, "llamacpp", "nothing") is None


def test_values_of_one_pair_or_of_all() -> None:
    found = results()
    assert len(summary.values(found, OURS, "decode-1", "tokens_per_second")) == 9
    assert summary.values(found, OURS, "decode-1", "tokens_per_second", pair="vllm") == [300.0, 200.0, 400.0]
    assert summary.per_setting(found, OURS, "decode-1") == "default"


def test_an_interval_of_ratios() -> None:
    assert summary.interval([]) is None and summary.interval([1.0]) is None
    same = summary.interval([0.5] * 40)
    assert same is not None and same.count == 40
    assert (same.mean, same.low, same.high) == pytest.approx((0.5, 0.5, 0.5))
    # Logarithms -0.1, 0, 0.1: a deviation of 0.1, and 4.303 for two degrees of freedom.
    found = summary.interval([math.exp(-0.1), 1.0, math.exp(0.1)])
    assert found is not None and found.mean == pytest.approx(1.0)
    assert math.log(found.high) == pytest.approx(4.303 * 0.1 / math.sqrt(3)) == pytest.approx(-math.log(found.low))


def test_an_interval_does_not_depend_on_who_is_divided_by_whom() -> None:
    ratios = [0.9, 1.1, 1.3, 1.0]
    one, other = summary.interval(ratios), summary.interval([1 / ratio for ratio in ratios])
    assert one is not None and other is not None
    assert (one.mean, one.low, one.high) == pytest.approx((1 / other.mean, 1 / other.high, 1 / other.low))
