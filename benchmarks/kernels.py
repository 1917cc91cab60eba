"""Projections as shares of the machine's limits, both measured in turn: `python -m benchmarks.kernels --help`.

A projection of M rows can go no faster than its weights can be read and no faster than its multiplications can be
issued: dot products of quants and int8 activations, multiply-adds of bfloat16 weights and float32 activations. The
larger of the two times is its limit; the share is that limit over the time it took.

One shape is measured in every format, from memory and from cache, and the projections of whole models, with random
weights, from memory. Tables and a roofline plot go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import BYTES, Limits, cpu_name, native_build, parse_options, write_json
from benchmarks.roofline import draw
from engine.kernels.layout import Correction, MatrixFormat

ROWS = (1, 4, 8, 32, 128)
SHAPE = (3072, 576)  # outputs, inputs: gate and up of SmolLM2-135M
MODEL_ROWS = (1, 8, 128)
MODELS = {
    "SmolLM2-135M": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
    "Llama-3.2-1B": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "Mistral-7B": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
MODEL_WEIGHTS = "4-bit, min"
STREAM_BYTES = 256 << 20  # of distinct weights, so that every one comes from memory
FORMATS = {
    "4-bit, min": (4, Correction.MIN),
    "4-bit, zero point": (4, Correction.ZERO_POINT),
    "8-bit, zero point": (8, Correction.ZERO_POINT),
    "bfloat16": (16, Correction.NONE),
}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: a projection of `rows` rows, with its weights from memory or from cache."""

    projection: str
    weights: str
    n: int
    k: int
    source: str
    rows: int

    @property
    def format(self) -> MatrixFormat:
        return MatrixFormat(self.n, self.k, *FORMATS[self.weights])

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.n * self.k


@dataclass(frozen=True, slots=True)
class Measurement:
    """One projection; times are medians, in microseconds."""

    case: Case
    microseconds: float
    gigabytes_per_second: float
    tera_operations: float
    share: float  # of the limit that binds
    bound: str  # read, int8 or float32


def cases() -> Iterator[Case]:
    """Every format of one shape; every projection of every model."""
    for weights in FORMATS:
        for source in ("memory", "cache"):
            for rows in ROWS:
                yield Case("any", weights, *SHAPE, source, rows)
    for model, projections in MODELS.items():
        for name, (n, k) in projections.items():
            for rows in MODEL_ROWS:
                yield Case(f"{model} {name}", MODEL_WEIGHTS, n, k, "memory", rows)


def measure(module: ModuleType, threads: int, repeats: int) -> tuple[Limits, list[Measurement]]:
    """Every case, `repeats` times.

    Each repeat measures the limits and then every projection once: what else the machine does meanwhile slows both.
    """
    # Small quants, scales of 1 (0x3c00 as float16), bfloat16 of 0.01: no denormals, whose arithmetic would be slower.
    data = np.full(STREAM_BYTES, 0x3C, np.uint8)
    reads: dict[int, list[float]] = {t: [] for t in range(1, threads + 1)}
    int8, float32, bf16 = [], [], []
    times: dict[Case, list[float]] = {case: [] for case in cases()}
    for _ in track(range(repeats), "Measuring", transient=True):
        for t, values in reads.items():
            values.append(module.read_bandwidth(BYTES, t))
        int8.append(module.int8_rate(threads))
        float32.append(module.float32_rate(threads))
        bf16.append(module.bf16_rate(threads))
        for case, seconds in times.items():
            seconds.append(time_projection(module, data, case, threads))
    limits = Limits(
        {t: statistics.median(values) for t, values in reads.items()},
        {threads: statistics.median(int8)},
        {threads: statistics.median(float32)},
        {threads: statistics.median(bf16)},
    )
    return limits, [share_of(limits, threads, case, statistics.median(seconds)) for case, seconds in times.items()]


def time_projection(module: ModuleType, data: np.ndarray, case: Case, threads: int) -> float:
    """Seconds of one projection, over turns that read other weights each ("memory") or the same ones."""
    fmt = case.format
    many = len(data) // fmt.nbytes
    copies = many if case.source == "memory" else 1
    turns = max(2, min(many, 4000 // case.rows))
    matrix = (data[: copies * fmt.nbytes], fmt.n, fmt.k, fmt.bits, fmt.correction is Correction.MIN)
    seconds: float = module.time_matmul(matrix, copies, case.rows, turns, threads)
    return seconds / turns


def share_of(limits: Limits, threads: int, case: Case, time: float) -> Measurement:
    """A projection that took `time` seconds, beside what binds it."""
    fmt = case.format
    rate, arithmetic = (limits.int8_tops, "int8") if fmt.is_quantized else (limits.float32_tops, "float32")
    by_read = fmt.nbytes / (limits.read_gbs[threads] * 1e9) if case.source == "memory" else 0.0
    by_rate = case.operations / (rate[threads] * 1e12)
    return Measurement(
        case,
        time * 1e6,
        fmt.nbytes / time * 1e-9,
        case.operations / time * 1e-12,
        max(by_read, by_rate) / time,
        "read" if by_read > by_rate else arithmetic,
    )


COLUMNS = ("projection", "N", "K", "weights", "from", "M", "µs", "GB/s", "TOP/s", "share of limit", "bound by")


def row_of(m: Measurement) -> tuple[str, ...]:
    c = m.case
    return (
        *(c.projection, str(c.n), str(c.k), c.weights, c.source, str(c.rows)),
        *(f"{m.microseconds:.1f}", f"{m.gigabytes_per_second:.1f}", f"{m.tera_operations:.3f}"),
        *(f"{m.share:.0%}", m.bound),
    )


def title_of(limits: Limits, isa: str, threads: int) -> str:
    """The machine and its limits."""
    reads = ", ".join(f"{gbs:.1f} ({t})" for t, gbs in limits.read_gbs.items())
    return (
        f"{cpu_name()}, {isa}, {threads} thread(s): reads {reads} GB/s by number of threads, "
        f"int8 dot products {limits.int8_tops[threads]:.2f}, float32 multiply-adds {limits.float32_tops[threads]:.2f}, "
        f"bf16 dot products {limits.bf16_tops[threads]:.2f} TOP/s"
    )


def console_table(title: str, measurements: Sequence[Measurement]) -> Table:
    table = Table(title=title)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("projection", "weights", "from", "bound by") else "right")
    for m in measurements:
        table.add_row(*row_of(m))
    return table


def markdown(title: str, measurements: Sequence[Measurement], plot: str) -> str:
    """The same as a page beside the plot."""
    lines = ["# Projections beside the machine's limits", "", title + ".", "", f"![Roofline]({plot})", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row_of(m)) + " |" for m in measurements]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of table and plot (default: %(default)s)")
    args = parse_options(parser)
    isa: str = args.isa

    limits, measurements = measure(native_build(isa), args.threads, args.repeats)
    title = title_of(limits, isa, args.threads)
    Console(width=150).print(console_table(title, measurements))

    args.results.mkdir(parents=True, exist_ok=True)
    page, plot = args.results / f"kernels-{isa}.md", args.results / f"kernels-{isa}.svg"
    draw(plot, limits, args.threads, [asdict(m) for m in measurements])
    page.write_text(markdown(title, measurements, plot.name))
    print(f"table and plot: {page}, {plot}")
    if args.json:
        figures = {"cpu": cpu_name(), "isa": isa, "threads": args.threads, "limits": asdict(limits)}
        write_json(args.json, figures | {"projections": [asdict(m) for m in measurements]})


if __name__ == "__main__":
    main()
