"""What embedding a library costs chats that it shares threads with: `python -m benchmarks.sharing --help`.

Streams decode for a while alone, then with texts waiting for the encoder the whole time, then alone again, for their
contexts grow and with them the steps. Shown is what the streams lost, the longest gap between two of their tokens
either way, and what the encoder got done meanwhile, beside what it does when nobody chats.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import cpu_name, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from benchmarks.offline import Bench
from engine.request import EmbedRequest, TextInput
from engine.weights import load_encoder

ENCODER = "all-minilm-l6-v2"
STREAMS = (1, 4, 32)
STEPS = {1: 200, 4: 120, 32: 50}
PROMPT = 64
TEXT_TOKENS = 128
TEXTS = 256  # of a request


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians over the turns."""

    streams: int
    alone: float  # tokens per second
    beside: float
    lost: float  # share
    gap_alone: float  # seconds, the longest between two steps
    gap_beside: float
    embedded: float  # tokens of texts per second meanwhile
    embedded_alone: float  # where nobody chats


class Library:
    """Texts without end for the encoder of a core."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._serial = itertools.count()
        self._rng = np.random.default_rng(1)
        self.last = ""  # request

    def refill(self) -> None:
        """Have a request wait."""
        texts = self._rng.integers(1000, 30_000, (TEXTS, TEXT_TOKENS)).tolist()
        self.last = f"t{next(self._serial)}"
        inputs = [TextInput(ids) for ids in texts]
        self._bench.core.embed(EmbedRequest(request_id=self.last, model=ENCODER, inputs=inputs))

    def drain(self) -> None:
        self._bench.finish()
        self._bench.core.take_embedded()

    def alone(self) -> float:
        """Tokens of texts per second where nobody chats."""
        self.refill()
        started = time.perf_counter()
        self.drain()
        return TEXTS * TEXT_TOKENS / (time.perf_counter() - started)


def decode(bench: Bench, library: Library | None, streams: int) -> tuple[float, float, float]:
    """Tokens per second, the longest gap, and tokens of texts per second over STEPS steps in which all decode."""
    core, gaps = bench.core, []
    if library is not None:
        library.refill()
    before = core.stats().num_encoded_tokens
    begun = last = time.perf_counter()
    for _ in range(STEPS[streams]):
        core.step()
        if core.take_embedded() and library is not None:
            library.refill()
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
    seconds = last - begun
    return streams * STEPS[streams] / seconds, max(gaps), (core.stats().num_encoded_tokens - before) / seconds


def measure(bench: Bench, streams: int, turns: int, console: Console) -> Cost:
    library = Library(bench)
    found = []
    for _ in track(range(turns), description=f"{streams} streams", console=console, transient=True):
        for _ in range(streams):
            bench.add(PROMPT, 3 * STEPS[streams] + streams + 64)
        seen: set[str] = set()
        while len(seen) < streams:
            seen.update(delta.request_id for delta in bench.core.step() if delta.token_ids)
        before = decode(bench, None, streams)
        beside = decode(bench, library, streams)
        bench.core.abort(library.last)
        after = decode(bench, None, streams)
        library.drain()
        alone = (statistics.harmonic_mean((before[0], after[0])), max(before[1], after[1]))
        found.append((alone, beside, library.alone()))
    return Cost(
        streams=streams,
        alone=statistics.median(alone[0] for alone, _, _ in found),
        beside=statistics.median(beside[0] for _, beside, _ in found),
        lost=statistics.median(1 - beside[0] / alone[0] for alone, beside, _ in found),
        gap_alone=statistics.median(alone[1] for alone, _, _ in found),
        gap_beside=statistics.median(beside[1] for _, beside, _ in found),
        embedded=statistics.median(beside[2] for _, beside, _ in found),
        embedded_alone=statistics.median(each for _, _, each in found),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    args = parse_options(parser)
    model, encoder = load(parser, args), load_encoder(ENCODER)
    bench = Bench(
        model,
        encoder,
        streams=max(STREAMS),
        length=PROMPT + 3 * max(STEPS.values()) + max(STREAMS) + 64,
        kv_cache_dtype=args.kv_cache_dtype,
        isa=args.isa,
        threads=args.threads,
    )
    console = Console()
    try:
        costs = [measure(bench, streams, args.repeats, console) for streams in STREAMS]
    finally:
        bench.core.close()
        model.close()
        encoder.close()
    table = Table(title=f"{described(model)} beside {ENCODER}, {args.isa}, {args.threads} threads, {cpu_name()}")
    for column in (
        "streams",
        "tokens/s alone",
        "embedding",
        "lost",
        "longest gap",
        "embedding",
        "texts' tokens/s",
        "of",
    ):
        table.add_column(column, justify="right")
    for cost in costs:
        table.add_row(
            str(cost.streams),
            f"{cost.alone:.0f}",
            f"{cost.beside:.0f}",
            f"{cost.lost:.1%}",
            f"{cost.gap_alone * 1e3:.1f} ms",
            f"{cost.gap_beside * 1e3:.1f} ms",
            f"{cost.embedded:,.0f}",
            f"{cost.embedded_alone:,.0f}",
        )
    console.print(table)
    if args.json is not None:
        path: Path = args.json
        write_json(path, {"cpu": cpu_name(), "isa": args.isa, "costs": [asdict(cost) for cost in costs]})


if __name__ == "__main__":
    main()
