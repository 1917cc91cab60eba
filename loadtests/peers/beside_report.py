"""The page's part about our server over vLLM: of results of its own, and put into a page that others write."""

from __future__ import annotations

import re

from loadtests.peers import summary
from loadtests.peers.beside import SETTING, TASK, THEIRS
from loadtests.peers.records import Results
from loadtests.peers.report import cell, concurrency, pairs_of, systems, table
from loadtests.peers.summary import Interval

HEADING = "## Over vLLM, beside vLLM's own server"
BEFORE = "## Settings"
"""The heading that the part stands before; on a page without it the part is the last one."""

LIMIT = 0.97
"""What the lower end of a ratio's interval has to reach."""

LENGTHS = " to ".join(f"{TASK.tokens * (1 + sign * TASK.spread):.0f}" for sign in (-1, 1))

INTRODUCTION = f"""\
`seraph serve --engine vllm` and vLLM's own server, over the same vLLM with the same options ({SETTING}). Greedy chats
of about 100 prompt tokens in a closed loop, {TASK.waves} a stream, with {LENGTHS} output tokens, so that streams ask
one by one and not all at once. Every pair begins with a start of both. They are alive together, one is asked
straight after the other, and who comes first alternates. A ratio is the geometric mean of the pairs' own, with its 95 %
interval by Student's t distribution of their logarithms; above 1 Seraph has more tokens per second or less time to the
first token. A bar is reached where the lower end of the interval reaches it.
"""

TABLES = (
    ("Output tokens per second", "tokens_per_second", 1.0),
    ("Time to first token, ms", "ttft", 1e3),
    ("Time per output token, ms", "tpot", 1e3),
    ("CPU time of the server without vLLM's engine, ms per token", "cpu_seconds", 1e3),
)
"""Title, figure and scale."""


def section(results: Results) -> str:
    """The part as Markdown, from the results alone."""
    streams = concurrency(results)
    parts = [
        f"{HEADING}\n\n{INTRODUCTION}",
        table(("figure", "at least", "measured", ""), [_bar(results, name, n) for n in streams for name in BARRED]),
    ]
    for title, figure, scale in TABLES:
        rows = [
            (
                results.header.versions[name],
                *(
                    cell(summary.middle(summary.values(results, name, TASK.name, f"{figure}@{n}")), scale)
                    for n in streams
                ),
            )
            for name in systems(results)
        ]
        parts.append(table((title, *(f"{n} streams" for n in streams)), rows))
    machine = "; ".join(f"{name}: {value}" for name, value in results.header.machine.items())
    parts.append(
        f"{machine}. {_beside(results)}\n\n"
        "`make bench-vllm` measures this and writes it into the page, with the same prompts in every pair.\n"
    )
    return "\n".join(parts)


BARRED = {"tokens_per_second": "output tokens per second", "ttft": "time to first token, vLLM's by Seraph's"}
"""Figures whose ratio a bar is about, as the page calls them."""


def ratio(results: Results, figure: str, streams: int) -> Interval | None:
    """Ours by theirs, or, of a time, theirs by ours."""
    both = summary.pairs(results, THEIRS, TASK.name, f"{figure}@{streams}")
    return summary.interval([theirs / ours if figure == "ttft" else ours / theirs for ours, theirs in both])


def _bar(results: Results, figure: str, streams: int) -> tuple[str, str, str, str]:
    title, limit = f"{BARRED[figure]}, {streams} streams", f"{LIMIT:.2f}x"
    found = ratio(results, figure, streams)
    if found is None:
        return title, limit, "not measured", ""
    shown = f"{found.mean:.3f}x ({found.low:.3f} to {found.high:.3f}, {pairs_of(found.count)})"
    return title, limit, shown, "reached" if found.low >= LIMIT else "missed"


def _beside(results: Results) -> str:
    """What else used the CPUs."""

    def most(figure: str) -> str:
        names = [f"{figure}@{n}" for n in concurrency(results)]
        return f"{max((one.figures.get(name, 0.0) for one in results.measurements for name in names), default=0.0):.0%}"

    return f"Of a CPU the client took {most('client_cpus')} at most, the server that was not asked {most('idle_cpus')}."


def section_of(page: str) -> str:
    """The part that a page has; empty where it has none."""
    found = re.search(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[0].rstrip("\n") + "\n" if found else ""


def put(page: str, section: str) -> str:
    """The page with this part instead of the one that it has, or with it where it has none."""
    if old := section_of(page):
        return page.replace(old, section)
    before, heading, after = page.partition(f"{BEFORE}\n")
    return f"{before}{section}\n{heading}{after}" if heading else f"{page.rstrip()}\n\n{section}".lstrip("\n")
