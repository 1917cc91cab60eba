"""What a busy process beside the engine costs it: `python -m benchmarks.contention --help`.

The process is stopped and let go in turn. Of every pair: how much of a CPU it took away, and how much slower the engine
was for it. Losing as much as was taken is a ratio of 1: the work waits for nobody. A team that waits at every phase for
a thread that has lost its CPU loses several times as much.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_name, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from benchmarks.offline import Bench

STREAMS = (1, 4, 32)
STEPS = {1: 200, 4: 120, 32: 40}
PROMPT = 64
BUSY = "while True: pass"


@dataclass(frozen=True, slots=True)
class Loss:
    """Medians over the pairs."""

    streams: int
    alone: float  # tokens per second
    beside: float
    taken: float  # CPUs that the busy process used
    share_taken: float  # of the engine's threads' CPUs
    share_lost: float  # of its tokens per second

    @property
    def ratio(self) -> float:
        return self.share_lost / self.share_taken


class BusyProcess:
    """A process that computes as long as it is let."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", BUSY])
        self.pause()

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Time on a CPU so far, proc(5)."""
        return int(Path(f"/proc/{self._process.pid}/schedstat").read_text().split()[0]) / 1e9

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def busy_process() -> Iterator[BusyProcess]:
    process = BusyProcess()
    try:
        yield process
    finally:
        process.end()


def rate(bench: Bench, streams: int) -> float:
    """Tokens per second of STEPS steps in which all streams decode."""
    begin = time.perf_counter()
    for _ in range(STEPS[streams]):
        bench.core.step()
    return streams * STEPS[streams] / (time.perf_counter() - begin)


def measure(bench: Bench, busy: BusyProcess, streams: int, pairs: int, threads: int) -> Loss:
    """Pairs of a run alone and one beside the busy process."""
    found: list[tuple[float, float, float]] = []
    for _ in range(pairs):
        for _ in range(streams):
            bench.add(PROMPT, 2 * STEPS[streams] + streams + 64)
        seen: set[str] = set()
        while len(seen) < streams:
            seen.update(delta.request_id for delta in bench.core.step() if delta.token_ids)
        alone = rate(bench, streams)
        busy.go_on()
        begin, used = time.perf_counter(), busy.cpu_seconds()
        beside = rate(bench, streams)
        taken = (busy.cpu_seconds() - used) / (time.perf_counter() - begin)
        busy.pause()
        bench.finish()
        found.append((alone, beside, taken))
    taken = statistics.median(pair[2] for pair in found)
    return Loss(
        streams=streams,
        alone=statistics.median(pair[0] for pair in found),
        beside=statistics.median(pair[1] for pair in found),
        taken=taken,
        share_taken=taken / threads,
        share_lost=statistics.median(1 - pair[1] / pair[0] for pair in found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    args = parse_options(parser)
    model = load(parser, args)
    length = PROMPT + 2 * max(STEPS.values()) + max(STREAMS) + 64
    bench = Bench(
        model,
        streams=max(STREAMS),
        length=length,
        kv_cache_dtype=args.kv_cache_dtype,
        isa=args.isa,
        threads=args.threads,
    )
    try:
        with busy_process() as busy:
            losses = [measure(bench, busy, streams, args.repeats, args.threads) for streams in STREAMS]
    finally:
        bench.core.close()
        model.close()
    table = Table(title=f"{described(model)}, {args.isa}, {args.threads} threads, {cpu_name()}: beside a busy process")
    for column in ("streams", "tokens/s alone", "beside it", "CPUs it took", "of ours", "lost", "lost / taken"):
        table.add_column(column, justify="right")
    for loss in losses:
        shares = (f"{loss.share_taken:.0%}", f"{loss.share_lost:.0%}", f"{loss.ratio:.2f}")
        table.add_row(str(loss.streams), f"{loss.alone:.0f}", f"{loss.beside:.0f}", f"{loss.taken:.2f}", *shares)
    Console(width=120).print(table)
    if args.json:
        figures = {"cpu": cpu_name(), "model": model.name, "isa": args.isa, "threads": args.threads}
        write_json(args.json, figures | {"losses": [asdict(loss) for loss in losses]})


if __name__ == "__main__":
    main()
