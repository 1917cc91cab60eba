"""Projections as shares of the machine's limits, both measured in turn: `python -m benchmarks.kernels --help`.

A projection of M rows can go no faster than its weights can be read and no faster than its multiplications can be
issued: dot products of quants and int8 activations, multiply-adds of bfloat16 weights and float32 activations. The
larger of the two times is its limit; the share is that limit over the time it took.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import BYTES, Limits, cpu_name, native_build, parse_options, write_json
from engine.kernels.layout import Correction, MatrixFormat

ROWS = (1, 4, 8, 32, 128)
SHAPE = (3072, 576)  # outputs, inputs: gate and up of SmolLM2-135M
STREAM_BYTES = 192 << 20  # of distinct weights, so that every one comes from memory
FORMATS = {
    "4-bit, min": (4, Correction.MIN),
    "4-bit, zero point": (4, Correction.ZERO_POINT),
    "8-bit, zero point": (8, Correction.ZERO_POINT),
    "bfloat16": (16, Correction.NONE),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One projection; times are medians, in microseconds."""

    weights: str
    source: str  # memory or cache
    rows: int
    microseconds: float
    gigabytes_per_second: float
    tera_operations: float
    share: float  # of the limit that binds
    bound: str  # read, int8 or float32


def measure(module: ModuleType, threads: int, repeats: int) -> tuple[Limits, list[Measurement]]:
    """Every format, from memory and from cache, for every number of rows.

    Each repeat measures the limits and then every projection once: what else the machine does meanwhile slows both.
    """
    # Small quants, scales of 1 (0x3c00 as float16), bfloat16 of 0.01: no denormals, whose arithmetic would be slower.
    data = np.full(STREAM_BYTES, 0x3C, np.uint8)
    reads, int8, float32 = [], [], []
    times: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(repeats):
        reads.append(module.read_bandwidth(BYTES, threads))
        int8.append(module.int8_rate(threads))
        float32.append(module.float32_rate(threads))
        for weights in FORMATS:
            for source in ("memory", "cache"):
                for rows in ROWS:
                    time = time_projection(module, data, weights, source, rows, threads)
                    times.setdefault((weights, source, rows), []).append(time)
    limits = Limits(*({threads: statistics.median(values)} for values in (reads, int8, float32)))
    return limits, [share_of(limits, threads, *key, statistics.median(values)) for key, values in times.items()]


def time_projection(module: ModuleType, data: np.ndarray, weights: str, source: str, rows: int, threads: int) -> float:
    """Seconds of one projection, over turns that read other weights each ("memory") or the same ones."""
    fmt = format_of(weights)
    many = len(data) // fmt.nbytes
    copies = many if source == "memory" else 1
    turns = max(4, min(many, 4000 // rows))
    matrix = (data[: copies * fmt.nbytes], fmt.n, fmt.k, fmt.bits, fmt.correction is Correction.MIN)
    seconds: float = module.time_matmul(matrix, copies, rows, turns, threads)
    return seconds / turns


def share_of(limits: Limits, threads: int, weights: str, source: str, rows: int, time: float) -> Measurement:
    """A projection that took `time` seconds, beside what binds it."""
    fmt = format_of(weights)
    rate, arithmetic = (limits.int8_tops, "int8") if fmt.is_quantized else (limits.float32_tops, "float32")
    operations = 2 * rows * fmt.n * fmt.k
    by_read = fmt.nbytes / (limits.read_gbs[threads] * 1e9) if source == "memory" else 0.0
    by_rate = operations / (rate[threads] * 1e12)
    return Measurement(
        weights,
        source,
        rows,
        time * 1e6,
        fmt.nbytes / time * 1e-9,
        operations / time * 1e-12,
        max(by_read, by_rate) / time,
        "read" if by_read > by_rate else arithmetic,
    )


def format_of(weights: str) -> MatrixFormat:
    return MatrixFormat(*SHAPE, *FORMATS[weights])


def table_of(measurements: list[Measurement], limits: Limits, isa: str, threads: int) -> Table:
    """The figures, one line each, with the limits in the title."""
    n, k = SHAPE
    title = (
        f"{cpu_name()}, {isa}, {threads} thread(s): reads {limits.read_gbs[threads]:.1f} GB/s, "
        f"int8 {limits.int8_tops[threads]:.2f}, float32 {limits.float32_tops[threads]:.2f} TOP/s; "
        f"projection K={k}, N={n}"
    )
    table = Table(title=title)
    for name in ("weights", "from"):
        table.add_column(name)
    for name in ("M", "µs", "GB/s", "TOP/s", "share of limit"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for m in measurements:
        table.add_row(
            m.weights,
            m.source,
            str(m.rows),
            f"{m.microseconds:.1f}",
            f"{m.gigabytes_per_second:.1f}",
            f"{m.tera_operations:.3f}",
            f"{m.share:.0%}",
            m.bound,
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_options(parser)
    isa: str = args.isa

    limits, measurements = measure(native_build(isa), args.threads, args.repeats)
    Console(width=140).print(table_of(measurements, limits, isa, args.threads))
    if args.json:
        figures = {"cpu": cpu_name(), "isa": isa, "threads": args.threads, "limits": asdict(limits)}
        write_json(args.json, figures | {"projections": [asdict(m) for m in measurements]})


if __name__ == "__main__":
    main()
