from __future__ import annotations

import json
from typing import Any

import pytest

from loadtests.events import Heard
from loadtests.report import Measurements, as_json, as_markdown, as_table, percentile, spread, summarize


def heard(**changes: Any) -> Heard:
    whole: dict[str, Any] = {
        "text": "abc",
        "time_to_first_token": 0.2,
        "gaps": [0.01, 0.03],
        "num_counted_tokens": 3,
        "num_prompt_tokens": 10,
        "num_cached_tokens": 5,
    }
    return Heard(**{**whole, **changes})


def measurements() -> Measurements:
    """Two answers, a failure and an answer cut short, in 4 s."""
    measured = Measurements(scenario="s", users=2, seconds=4.0)
    measured.add(heard(), latency=0.24)
    measured.add(heard(time_to_first_token=0.4), latency=0.5)
    measured.add(heard(time_to_first_token=None, gaps=[], num_counted_tokens=None, error="boom | bang"), latency=0.1)
    measured.num_cut_short += 1
    measured.add_partly(heard(num_counted_tokens=None))
    return measured


def test_percentiles_are_nearest_ranks() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.0, 0.01, 0.5, 0.95, 0.951, 1.0)] == [1, 1, 50, 95, 96, 100]
    assert percentile([7.0], 0.5) == 7.0


def test_spread_is_in_milliseconds() -> None:
    found = spread([0.001, 0.002, 0.010])
    assert found is not None
    assert (found.p50, found.p95, found.p99, found.max) == (2.0, 10.0, 10.0, 10.0)
    assert spread([]) is None


def test_figures() -> None:
    report = summarize(measurements())
    assert (report.requests, report.failures, report.cut_short) == (2, 1, 1)
    assert report.requests_per_second == 0.5
    assert report.output_tokens_per_second == 2.25  # 3 + 3 + 0 + 3 in 4 s
    assert report.prompt_tokens_per_second == 7.5
    assert report.cached_share == 0.5
    assert report.time_to_first_token_ms is not None
    assert (report.time_to_first_token_ms.p50, report.time_to_first_token_ms.max) == (200.0, 400.0)
    assert report.inter_token_latency_ms is not None
    assert (report.inter_token_latency_ms.p50, report.inter_token_latency_ms.p95) == (10.0, 30.0)
    assert report.reasons == {"boom | bang": 1}


def test_success_needs_answers_and_no_failure() -> None:
    measured = measurements()
    assert not summarize(measured).succeeded()
    measured.failures.clear()
    assert summarize(measured).succeeded()
    assert not summarize(Measurements(seconds=1.0)).succeeded()


def test_a_run_without_a_measurement_can_be_reported() -> None:
    report = summarize(Measurements())
    assert "none measured" in as_table(report)
    assert report.output_tokens_per_second == 0.0


def test_measurements_survive_their_file() -> None:
    measured = measurements()
    again = Measurements.from_json(measured.to_json())
    assert again == measured
    assert summarize(again) == summarize(measured)
    with pytest.raises(TypeError):
        Measurements.from_json('{"failures": {}, "other": 1}')


def test_forms() -> None:
    report = summarize(measurements())
    assert json.loads(as_json(report))["time_to_first_token_ms"]["p95"] == 400.0
    lines = as_markdown(report).splitlines()
    assert lines[:2] == ["| | |", "|---|---|"]
    assert "| output tokens/s | 2.2 |" in lines or "| output tokens/s | 2.3 |" in lines
    assert r"| 1 x | boom \| bang |" in lines
    assert "failures         1" in as_table(report)
