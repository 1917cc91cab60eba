"""Measurements of a load test, and the report made of them: table, Markdown or JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loadtests.events import Heard

MAX_REASONS = 8
"""Reasons of failure that are told apart in a table, the most frequent first; JSON has all."""


@dataclass(slots=True, kw_only=True)
class Measurements:
    """Everything that the users of one run saw. Times are seconds."""

    scenario: str = ""
    users: int = 0
    seconds: float = 0.0  # from the first question to the end of the run
    latencies: list[float] = field(default_factory=list)  # of whole answers
    times_to_first_token: list[float] = field(default_factory=list)
    inter_token_latencies: list[float] = field(default_factory=list)
    num_output_tokens: int = 0  # of failed answers and those the end cut short, too
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_cut_short: int = 0  # answers that the end of the run interrupted
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, heard: Heard, latency: float) -> None:
        """Count an answer, complete or failed."""
        self.add_partly(heard)
        self.num_prompt_tokens += heard.num_prompt_tokens
        self.num_cached_tokens += heard.num_cached_tokens
        if heard.error is None:
            self.latencies.append(latency)
        else:
            self.failures[heard.error] += 1

    def add_partly(self, heard: Heard) -> None:
        """Count what came of an answer whose end is not known."""
        if heard.time_to_first_token is not None:
            self.times_to_first_token.append(heard.time_to_first_token)
        self.inter_token_latencies += heard.gaps
        self.num_output_tokens += heard.num_tokens

    def to_json(self) -> str:
        return json.dumps({one.name: getattr(self, one.name) for one in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> Measurements:
        """Raises ValueError or TypeError for what `to_json` did not write."""
        values = json.loads(text)
        return cls(**{**values, "failures": Counter(values["failures"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles of a time, in milliseconds."""

    p50: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run in figures. A spread is None where nothing was measured."""

    scenario: str
    users: int
    seconds: float
    requests: int  # answered completely
    failures: int
    cut_short: int
    requests_per_second: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float
    cached_share: float  # of prompt tokens
    time_to_first_token_ms: Spread | None
    inter_token_latency_ms: Spread | None
    latency_ms: Spread | None
    reasons: Mapping[str, int]  # of failures

    def succeeded(self) -> bool:
        """Whether the run shows a server that works: answers, and no failure."""
        return self.requests > 0 and self.failures == 0


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (0 to 1) of the values do not exceed (nearest rank)."""
    assert values and 0.0 <= share <= 1.0
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(seconds: Sequence[float]) -> Spread | None:
    if not seconds:
        return None
    p50, p95, p99 = (round(1e3 * percentile(seconds, share), 3) for share in (0.50, 0.95, 0.99))
    return Spread(p50=p50, p95=p95, p99=p99, max=round(1e3 * max(seconds), 3))


def summarize(measured: Measurements) -> Report:
    """The report of a run."""

    def rate(count: int) -> float:
        return round(count / measured.seconds, 2) if measured.seconds > 0 else 0.0

    return Report(
        scenario=measured.scenario,
        users=measured.users,
        seconds=round(measured.seconds, 2),
        requests=len(measured.latencies),
        failures=measured.failures.total(),
        cut_short=measured.num_cut_short,
        requests_per_second=rate(len(measured.latencies)),
        output_tokens_per_second=rate(measured.num_output_tokens),
        prompt_tokens_per_second=rate(measured.num_prompt_tokens),
        cached_share=round(measured.num_cached_tokens / max(1, measured.num_prompt_tokens), 3),
        time_to_first_token_ms=spread(measured.times_to_first_token),
        inter_token_latency_ms=spread(measured.inter_token_latencies),
        latency_ms=spread(measured.latencies),
        reasons=dict(measured.failures.most_common()),
    )


def rows(report: Report) -> list[tuple[str, str]]:
    """The report as pairs of a name and a value."""

    def times(one: Spread | None) -> str:
        if one is None:
            return "none measured"
        return f"p50 {one.p50:,.1f}   p95 {one.p95:,.1f}   p99 {one.p99:,.1f}   max {one.max:,.1f}"

    return [
        ("scenario", report.scenario),
        ("users", str(report.users)),
        ("duration", f"{report.seconds:.1f} s"),
        (
            "requests",
            f"{report.requests} ({report.requests_per_second:.2f}/s), {report.cut_short} cut short by the end",
        ),
        ("failures", str(report.failures)),
        ("output tokens/s", f"{report.output_tokens_per_second:,.1f}"),
        (
            "prompt tokens/s",
            f"{report.prompt_tokens_per_second:,.1f} ({report.cached_share:.0%} from the prefix cache)",
        ),
        ("TTFT, ms", times(report.time_to_first_token_ms)),
        ("ITL, ms", times(report.inter_token_latency_ms)),
        ("latency, ms", times(report.latency_ms)),
        *((f"{count} x", reason) for reason, count in list(report.reasons.items())[:MAX_REASONS]),
    ]


def as_table(report: Report) -> str:
    """For the terminal."""
    return "\n".join(f"  {name:<16} {value}" for name, value in rows(report))


def as_markdown(report: Report) -> str:
    """A table of two columns."""

    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|")

    lines = ["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in rows(report))]
    return "\n".join(lines) + "\n"


def as_json(report: Report) -> str:
    values: dict[str, Any] = asdict(report)
    return json.dumps(values, indent=2) + "\n"
