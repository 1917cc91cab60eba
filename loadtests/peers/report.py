"""The page and its plots, from the results alone: the same results give the same page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.peers import summary
from loadtests.peers.plan import OURS, context_name
from loadtests.peers.records import Results
from loadtests.peers.summary import Middle

PLOTS: Mapping[str, str] = {
    "throughput.svg": "Output tokens per second against concurrency",
    "latency.svg": "Time to first token and time per output token against concurrency",
    "context.svg": "Decoded tokens per second of one stream against its context",
    "loads.svg": "Single loads",
}

LOADS: Mapping[str, str] = {
    "prefill-512": "prefill of 512",
    "decode-1": "decode, 1 stream",
    "decode-32": "decode, 32 streams",
}
"""Tasks other than serving and those at a context, as the page calls them."""

PHASES: Mapping[str, str] = {
    "prepare": "plan of the step",
    "embed": "embedding",
    "attn_norm": "norm before attention",
    "qkv": "queries, keys, values",
    "rope": "rotary positions, cache writes",
    "attend": "attention",
    "merge": "attention, merged and quantized",
    "out": "attention's output",
    "ffn_norm": "norm before the gate",
    "gate_up": "gate and up",
    "down": "down",
    "final": "last norm",
    "head": "head, with greedy choice",
    "sample": "sampling",
    "outside": "outside the kernels (Python)",
}
"""The phases of a step as the page calls them."""

BOUNDS = """
A projection of one row is bound by reading its weights, one of many by issuing multiplications. On a core of Zen 4 or
5, with AVX-512, a group of 32 inputs and 32 outputs takes 16 dot products, and beside them two multiplications and two
multiply-adds for its scales, two more for its minima, all on the same ports: of its dot product rate a projection in
these formats can reach 80 % at most, with minima 73 %. Shares above that are of one row.
"""

TRIED: Sequence[tuple[str, str]] = (
    (
        "fetching weights 8 KB ahead into the second-level cache",
        "kept: a step of one stream takes 8 % less time, one of four 19 %, and 8 rows of 8-bit weights half the time",
    ),
    (
        "fetching the next strip of weights while several passes go over one",
        "kept: 32 rows from memory at 58 instead of 50 % of the rate (8-bit weights), 61 instead of 56 % (4-bit)",
    ),
    ("16-bit dot products for 8-bit keys and values", "kept: attention takes 27 % less time in a prefill of 512"),
    ("choosing greedily with the tiles of the head", "kept: logits, 6 MB at 32 rows, are neither written nor read"),
    ("SiLU and rounding of several rows side by side", "kept: gate and up take 6 % less time in a prefill of 512"),
    ("weights in huge pages", "kept where they are small beside the memory"),
    (
        "activations of eight rows side by side, group by group",
        "kept: 4-bit weights in cache at 73 instead of 70 % of the rate; 8-bit ones, beside which the compiler kept 64 "
        "addresses on its stack, at 73 instead of 64 %",
    ),
    (
        "keys, values and their scales fetched into the second-level cache, a tile's first block by the tile before",
        "kept: attention of 32 streams at 224 tokens takes 4.7 instead of 8.2 ms of one thread, of one at 4,096 tokens "
        "2.5 instead of 4.1",
    ),
    (
        "rows of its own for each thread instead of columns, from 16 rows a thread on",
        "kept: queries, keys, values at 67 instead of 64 % of the rate; where the two CPUs share no cache a step of 32 "
        "streams takes 18.0 instead of 20.3 ms",
    ),
    (
        "a step's arrays checked in C++, those of the sampler kept for the next step",
        "kept: Python's share of a step is 0.26 instead of 0.6 ms at 32 streams, 0.1 instead of 0.5 at one",
    ),
    (
        "the first of several passes over a strip of weights fetches it into the first-level cache",
        "kept: on a core of Zen 5, 128 rows of 4-bit weights in cache at 76 instead of 72 % of the rate (with minima "
        "73 instead of 70), 32 rows of 8-bit weights at 64 instead of 56 %; a prefill of 512 takes 7 % less time",
    ),
    (
        "eight rows rounded to 8 bits together, e^x with one rounding by addition",
        "kept: norms take a quarter less time, gate and up 2 to 3 % less",
    ),
    (
        "a client that parses HTTP in C and no event after the first",
        "kept: beside it 32 streams reach 1,850 instead of 1,650 tokens per second, for it shares the two CPUs",
    ),
    (
        "what an epilogue writes fetched before its pass",
        "kept: queries, keys, values of a prefill of 512 at 68 instead of 64 % of the rate, no change at 32 rows",
    ),
    (
        "strips divided into parts that stay in the first-level cache while all rows go over them",
        "dropped: 3 to 6 % slower",
    ),
    (
        "fetching the rows that a norm reads, and where keys and values are written",
        "dropped: nothing to be seen; writing one token's keys touches 32 lines a head",
    ),
    (
        "the next step's plan and arrays made in another thread while one is computed",
        "dropped: on two CPUs 3 % slower at one stream, 1 % at 32, for it takes a CPU from the kernels",
    ),
    (
        "fetching weights ahead into the first-level cache in every pass, on a core of Zen 4",
        "dropped: 3 to 8 points less of the rate with 8-bit weights",
    ),
    (
        "one scale for 128 activations instead of 32, or one that is a power of two, to leave a multiplication out",
        "dropped: perplexity rises by 0.6 or 0.2 % on top of the 0.46 % that 8-bit activations cost, and 0.5 % are "
        "allowed",
    ),
    (
        "gate and up shared among threads by columns instead of rows, at 32 rows on a core of Zen 5",
        "dropped: they take 6 % less time where the CPUs share a cache, and a whole step 11 % more where they do not",
    ),
    (
        "with AVX2, four rows of 8-bit weights at a time, and one row's weights fetched ahead",
        "kept: 128 rows take 2.0 instead of 3.1 ms, one row reads at 76 instead of 58 % of the bandwidth",
    ),
    ("unpacking a 4-bit tile once for 64 rows", "dropped: no faster, unpacking uses ports that are free"),
    ("fetching ahead for one row of 8-bit weights", "dropped: the hardware does better alone"),
    ("fetching a phase's first weights before its input is made", "dropped: nothing to be seen"),
)
"""What was tried to come closer to the limits, and what that brought when it was tried."""

Draw = Callable[[Results, Path], None]

INTRODUCTION = """\
# Performance

This page is generated: `make bench-peers` measures and writes it, and nobody edits it. Seraph and each peer serve the
same model, the default one, on the same machine in the same run. They take turns: of every pair one is measured
straight after the other, and who comes first alternates. Only one of them is alive at a time. A ratio is the median of
the ratios of the pairs; other figures are medians, with the lowest and the highest in brackets. Each peer is at the
setting that was fastest in short trials on this machine.
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that is to be reached, and how the results tell whether it is."""

    figure: str
    bar: str
    measure: Callable[[Results], Middle | None]
    limit: float
    form: Callable[[Middle], str]
    at_most: bool = False

    def row(self, results: Results) -> tuple[str, str, str, str]:
        found = self.measure(results)
        if found is None:
            return self.figure, self.bar, "not measured", ""
        reached = found.median <= self.limit if self.at_most else found.median >= self.limit
        return self.figure, self.bar, self.form(found), "reached" if reached else "missed"


def _ratio(peer: str, task: str, figure: str = "tokens_per_second") -> Callable[[Results], Middle | None]:
    return lambda results: summary.ratio(results, peer, task, figure)


def _least(*measures: Callable[[Results], Middle | None]) -> Callable[[Results], Middle | None]:
    """The smallest of several ratios: beside the best of several peers. None unless all are measured."""

    def measure(results: Results) -> Middle | None:
        found = [one(results) for one in measures]
        known = [one for one in found if one is not None]
        return min(known, key=lambda one: one.median) if len(known) == len(found) else None

    return measure


def _longest_share(results: Results) -> Middle | None:
    """Share of the bandwidth bound at the longest context, where that is 8k."""
    longest = contexts(results)[-1:]
    if not longest or longest[0] < 8000:
        return None
    return summary.middle(summary.values(results, OURS, context_name(longest[0]), "share"))


def _start(results: Results) -> Middle | None:
    return summary.middle(summary.values(results, OURS, "serve", "start_seconds"))


def _times(found: Middle) -> str:
    return f"{found.median:.2f}x ({found.low:.2f} to {found.high:.2f}, {pairs_of(found.count)})"


def _share(found: Middle) -> str:
    return f"{found.median:.0%} ({found.low:.0%} to {found.high:.0%}, {found.count} times)"


def _seconds(found: Middle) -> str:
    return f"{found.median:.2f} s ({found.low:.2f} to {found.high:.2f}, {found.count} times)"


def pairs_of(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


BARS = (
    Bar("one stream, decode", "1.6x llama.cpp (llama-bench tg128)", _ratio("llamacpp", "decode-1"), 1.6, _times),
    Bar("prefill of 512 tokens", "2.6x llama.cpp (llama-bench pp512)", _ratio("llamacpp", "prefill-512"), 2.6, _times),
    Bar(
        "32 streams, decode only",
        "2.7x the best of llama-batched-bench and OpenVINO",
        _least(_ratio("llamacpp", "decode-32"), _ratio("openvino", "decode-32")),
        2.7,
        _times,
    ),
    Bar(
        "32 streams over HTTP, prompts included",
        "2.0x OpenVINO offline",
        _ratio("openvino", "serve", "tokens_per_second@32"),
        2.0,
        _times,
    ),
    Bar(
        "32 streams over HTTP, prompts included",
        "3.0x vLLM CPU over HTTP",
        _ratio("vllm", "serve", "tokens_per_second@32"),
        3.0,
        _times,
    ),
    Bar("decode at 8k context", "60 % of the bandwidth bound", _longest_share, 0.6, _share),
    Bar("start to first token, warm", "1.5 s at most", _start, 1.5, _seconds, at_most=True),
)
"""The kernels' own bars, single projections and the sampler, are measured by `make bench`."""


def contexts(results: Results) -> list[int]:
    return [int(n) for n in results.header.plan["contexts"]]


def concurrency(results: Results) -> list[int]:
    return [int(n) for n in results.header.plan["concurrency"]]


def systems(results: Results) -> list[str]:
    """Those with figures, ours first, the others in the order of the plan."""
    measured = {one.system for one in results.measurements}
    return [name for name in (OURS, *results.header.plan["peers"]) if name in measured]


def write(results: Results, page: Path, folder: Path, draw: Draw) -> None:
    """Write the page, and its plots into `folder`, which `draw` fills with the files of PLOTS."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(results, folder)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(results, folder.relative_to(page.parent).as_posix()))


def render(results: Results, plots: str) -> str:
    """The page as Markdown; `plots`: the plots' folder as the page names it."""

    def plot(name: str) -> str:
        return f"![{PLOTS[name]}]({plots}/{name})\n"

    sections = [
        INTRODUCTION,
        _machine(results),
        _bars(results),
        *([_serving(results), plot("throughput.svg"), plot("latency.svg")] if _has(results, "serve") else []),
        *([_loads(results), plot("loads.svg")] if _has(results, *LOADS) else []),
        *([_contexts(results), plot("context.svg")] if _has(results, *map(context_name, contexts(results))) else []),
        _breakdown(results),
        _settings(results),
        _failures(results),
        _again(results),
    ]
    return "\n".join(section for section in sections if section)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


def cell(found: Middle | None, scale: float = 1.0) -> str:
    """Median and range; a dash where nothing was measured."""
    if found is None:
        return "-"
    return f"{number(found.median * scale)} ({number(found.low * scale)} to {number(found.high * scale)})"


def number(value: float) -> str:
    """Three significant digits, whole from 100 on."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _has(results: Results, *tasks: str) -> bool:
    return any(one.task in tasks for one in results.measurements)


def _title(results: Results, system: str) -> str:
    return results.header.versions[system]


def _machine(results: Results) -> str:
    rows = list(results.header.machine.items())
    reads = summary.middle([one.figures["read_gbs"] for one in results.measurements if "read_gbs" in one.figures])
    if reads:
        rows.append(("read bandwidth during the run", f"{cell(reads)} GB/s"))
    rates = summary.middle([one.figures["int8_tops"] for one in results.measurements if "int8_tops" in one.figures])
    if rates:
        rows.append(("int8 dot products during the run", f"{cell(rates)} Tops/s"))
    return "## The machine\n\n" + table(("", ""), rows)


def _bars(results: Results) -> str:
    rows = [bar.row(results) for bar in BARS]
    return "## Beside the bars\n\n" + table(("figure", "at least", "measured", ""), rows)


def _serving(results: Results) -> str:
    peers = [name for name in systems(results) if name != OURS]
    text = (
        "## Serving\n\n"
        "Greedy chats of about 100 prompt tokens and 128 output tokens, in a closed loop, prompts included.\n"
        "What is marked offline is called in its own process without a server, which spares it HTTP.\n\n"
    )
    for title, figure, scale in (
        ("Output tokens per second", "tokens_per_second", 1.0),
        ("Time to first token, ms", "ttft", 1e3),
        ("Time per output token, ms", "tpot", 1e3),
    ):
        rows = [
            (
                _title(results, name),
                *(
                    cell(summary.middle(summary.values(results, name, "serve", f"{figure}@{n}")), scale)
                    for n in concurrency(results)
                ),
            )
            for name in systems(results)
        ]
        if figure == "tokens_per_second":
            for peer in peers:
                ratios = [summary.ratio(results, peer, "serve", f"{figure}@{n}") for n in concurrency(results)]
                shown = (f"{one.median:.2f}x" if one else "-" for one in ratios)
                rows.append((f"*Seraph / {_title(results, peer)}*", *shown))
        text += table((title, *(f"{n} stream{'s' * (n > 1)}" for n in concurrency(results))), rows) + "\n"
    starts = [
        (
            _title(results, name),
            cell(summary.middle(summary.values(results, name, "serve", "start_seconds"))),
            cell(summary.middle(summary.values(results, name, "serve", "memory_mb"))),
        )
        for name in systems(results)
    ]
    after = "Start to first token, warm, s", "Resident memory after the load, MB"
    return text + table(("", *after), starts)


def _loads(results: Results) -> str:
    return "## Single loads, tokens per second\n\n" + _by_task(results, LOADS)


def _contexts(results: Results) -> str:
    tasks = {context_name(n): f"at {n:,} tokens" for n in contexts(results)}
    shares = [summary.middle(summary.values(results, OURS, name, "share")) for name in tasks]
    extra = [("*Seraph's share of the bandwidth bound*", *(f"{one.median:.0%}" if one else "-" for one in shares))]
    return "## Decode at a context, one stream, tokens per second\n\n" + _by_task(results, tasks, extra)


def _by_task(results: Results, tasks: Mapping[str, str], extra: Iterable[Sequence[str]] = ()) -> str:
    rows: list[Sequence[str]] = [
        (
            _title(results, name),
            *(cell(summary.middle(summary.values(results, name, task, "tokens_per_second"))) for task in tasks),
        )
        for name in systems(results)
    ]
    for peer in systems(results):
        if peer != OURS:
            ratios = [summary.ratio(results, peer, task) for task in tasks]
            shown = (f"{one.median:.2f}x" if one else "-" for one in ratios)
            rows.append((f"*Seraph / {_title(results, peer)}*", *shown))
    note = (
        "\n"
        "Seraph and llama.cpp by their own benchmarks; OpenVINO GenAI by its pipeline's steps; vLLM over HTTP, beside\n"
        "Seraph over HTTP, which its ratio is of.\n"
    )
    return table(("", *tasks.values()), [*rows, *extra]) + note


def _breakdown(results: Results) -> str:
    """Where our milliseconds go in each single load that a bar is about."""
    found = {task: _phases(results, task) for task in (*LOADS, *map(context_name, contexts(results)[-1:]))}
    found = {task: phases for task, phases in found.items() if phases}
    if not found:
        return ""
    measured = {name for phases in found.values() for name in phases}
    names = [name for name in PHASES if name in measured] + sorted(measured - PHASES.keys())
    rows = []
    for name in names:
        cells = []
        for task, phases in found.items():
            total = sum(phases.values())
            ms = phases.get(name, 0.0)
            limit = summary.middle(summary.values(results, OURS, task, f"limit.{name}"))
            share = f"{ms / total:.0%}" + (f"; {limit.median:.0%} of the limit" if limit else "")
            cells.append(f"{number(ms)} ({share})" if ms else "-")
        rows.append((PHASES.get(name, name), *cells))
    rows.append(("all", *(number(sum(phases.values())) for phases in found.values())))
    titles = {**LOADS, **{context_name(n): f"decode at {n:,} tokens" for n in contexts(results)}}
    return (
        "## Where Seraph's milliseconds go\n\n"
        "Of a step, or of all steps of the prompt; medians. A projection can go no faster than its weights can be\n"
        "read, or its dot products issued. What it uses of the larger of these two times, both measured beside each\n"
        "run, is its share of the limit.\n\n"
        + table(("", *(titles[task] for task in found)), rows)
        + BOUNDS
        + "\n"
        + table(("tried", "what it brought"), TRIED)
    )


def _phases(results: Results, task: str) -> dict[str, float]:
    """Median ms of each kind of phase, in the order of a step."""
    measured = (one for one in results.measurements if (one.system, one.task) == (OURS, task))
    names = dict.fromkeys(name for one in measured for name in one.figures if name.startswith("ms."))
    medians = {name: summary.middle(summary.values(results, OURS, task, name)) for name in names}
    return {name.removeprefix("ms."): found.median for name, found in medians.items() if found}


def _settings(results: Results) -> str:
    if not results.choices:
        return ""
    rows = [
        (
            _title(results, one.system),
            one.family,
            one.chosen,
            ", ".join(f"{label} {number(rate)}" if rate else f"{label} failed" for label, rate in one.trials.items()),
        )
        for one in results.choices
    ]
    return "## Settings\n\n" + table(("", "load", "chosen", "trials, tokens per second"), rows)


def _failures(results: Results) -> str:
    if not results.failures:
        return ""
    text = "## What failed\n\n"
    for one in results.failures:
        log = "\n".join(f"    {line}" for line in one.log.splitlines())
        text += f"{_title(results, one.system)}, {one.what}: {one.message}\n\n" + (f"{log}\n\n" if log else "")
    return text.rstrip("\n") + "\n"


def _again(results: Results) -> str:
    rounds = results.header.plan["rounds"]
    whole = min(rounds, results.header.plan["whole"])
    later = f", {whole} of them whole and {rounds - whole} of what the bars compare" * (whole < rounds)
    return (
        f"## Again\n\n`make bench-peers` installs the peers, measures {rounds} round{'s' * (rounds != 1)}{later}, and\n"
        "writes this page. Prompts and seeds are fixed. `python -m loadtests.peers report` writes it from results.\n"
    )
