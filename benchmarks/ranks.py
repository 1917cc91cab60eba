"""What tensor-parallel ranks cost and give: `python -m benchmarks.ranks --help`.

First the gather by itself: the time until every rank has written its part of so many bytes and read what the others
wrote, beside the time in which one thread copies as many, measured in turn. Then the engine with two ranks of half the
threads each beside one rank of all, on the same load in turn: of every pair how fast the ranks were for one. On one
NUMA node there is nothing to gain from ranks: what they lose there is what they cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType

from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_name, native_build, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from benchmarks.offline import Bench
from engine.config import EngineConfig
from engine.ranks import plan_ranks
from engine.weights import PackedModel

GATHERED = (2 << 10, 64 << 10, 1 << 20)  # bytes
TURNS = 500
RANKS = (2, 3)
STREAMS = (1, 32)
STEPS = {1: 100, 32: 30}
PROMPT = 64
PREFILL = 512


@dataclass(frozen=True, slots=True)
class Gather:
    """Medians over all turns."""

    ranks: int
    nbytes: int
    gather_us: float
    copy_us: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Medians over the pairs, tokens per second."""

    load: str
    one_rank: float
    two_ranks: float
    ratio: float  # of the two in one pair


def gathers(module: ModuleType, repeats: int) -> list[Gather]:
    """Every size with every number of ranks, a thread each."""
    found = []
    for size in RANKS:
        ranks = plan_ranks(EngineConfig(tensor_parallel_size=size, threads=size), size)
        layout = module.TeamLayout([*ranks.threads], [[*cpus] for cpus in ranks.cpus], ranks.stall_timeout, 0)
        for nbytes in GATHERED:
            gather: list[float] = []
            copy: list[float] = []
            for _ in range(repeats):
                gather += module.time_gather(nbytes, layout, TURNS)
                copy += module.time_copy(nbytes, TURNS)
            found.append(Gather(size, nbytes, statistics.median(gather) * 1e6, statistics.median(copy) * 1e6))
    return found


def decode(bench: Bench, streams: int) -> float:
    """Tokens per second of steps in which all streams decode."""
    for _ in range(streams):
        bench.add(PROMPT, STEPS[streams] + streams + 64)
    seen: set[str] = set()
    while len(seen) < streams:
        seen.update(delta.request_id for delta in bench.core.step() if delta.token_ids)
    begin = time.perf_counter()
    for _ in range(STEPS[streams]):
        bench.core.step()
    seconds = time.perf_counter() - begin
    bench.finish()
    return streams * STEPS[streams] / seconds


def prefill(bench: Bench) -> float:
    """Tokens per second of one prompt."""
    bench.add(PREFILL, 1)
    begin = time.perf_counter()
    bench.finish()
    return PREFILL / (time.perf_counter() - begin)


def pairs(model: PackedModel, repeats: int, *, kv_cache_dtype: str, isa: str, threads: int) -> list[Pair]:
    """One rank and two on the same loads, in turn; who comes first changes too."""
    benches = [
        Bench(
            model,
            streams=max(STREAMS),
            length=max(PREFILL, PROMPT + max(STEPS.values()) + max(STREAMS) + 64),
            kv_cache_dtype=kv_cache_dtype,
            isa=isa,
            threads=threads,
            tensor_parallel_size=size,
        )
        for size in (1, 2)
    ]
    loads: dict[str, Callable[[Bench], float]] = {
        **{f"decode, {n} stream{'s' if n > 1 else ''}": lambda bench, n=n: decode(bench, n) for n in STREAMS},  # type: ignore[misc]
        f"prefill of {PREFILL}": prefill,
    }
    found = []
    try:
        for name, run in loads.items():
            for bench in benches:
                run(bench)  # touches the memory that it needs
            rates: list[tuple[float, float]] = []
            for turn in range(repeats):
                order = (0, 1) if turn % 2 == 0 else (1, 0)
                measured = {index: run(benches[index]) for index in order}
                rates.append((measured[0], measured[1]))
            one, two = (statistics.median(rate[index] for rate in rates) for index in (0, 1))
            found.append(Pair(name, one, two, statistics.median(second / first for first, second in rates)))
    finally:
        for bench in benches:
            bench.core.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    args = parse_options(parser)
    if args.threads < 2:
        parser.error("two ranks need two threads")
    model = load(parser, args)
    try:
        latencies = gathers(native_build(args.isa), args.repeats)
        found = pairs(model, args.repeats, kv_cache_dtype=args.kv_cache_dtype, isa=args.isa, threads=args.threads)
    finally:
        model.close()
    console = Console(width=120)
    table = Table(title=f"gather, {cpu_name()}: a thread a rank, median of {TURNS * args.repeats}")
    for column in ("ranks", "bytes", "gather", "copy by one thread", "copy / gather"):
        table.add_column(column, justify="right")
    for one in latencies:
        share = f"{one.copy_us / one.gather_us:.0%}"
        table.add_row(str(one.ranks), f"{one.nbytes:,}", f"{one.gather_us:.1f} µs", f"{one.copy_us:.1f} µs", share)
    console.print(table)
    table = Table(title=f"{described(model)}, {args.isa}, {args.threads} threads, tokens/s")
    for column in ("load", "1 rank", "2 ranks", "2 ranks / 1 rank"):
        table.add_column(column, justify="right")
    for pair in found:
        table.add_row(pair.load, f"{pair.one_rank:,.0f}", f"{pair.two_ranks:,.0f}", f"{pair.ratio:.0%}")
    console.print(table)
    if args.json:
        figures = {"cpu": cpu_name(), "model": model.name, "isa": args.isa, "threads": args.threads}
        figures |= {"gathers": [asdict(one) for one in latencies], "pairs": [asdict(pair) for pair in found]}
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
