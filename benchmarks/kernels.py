"""Projections as shares of the machine's limits, both measured in turn: `python -m benchmarks.kernels --help`.

A projection of M rows can go no faster than its weights can be read and no faster than its dot products can be issued.
The larger of the two times is its limit; the share is that limit over the time it took.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import ModuleType

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Limits, cpu_name, measure_limits, native_build, parse_options, write_json
from engine.kernels.layout import Correction, MatrixFormat

ROWS = (1, 4, 8, 32, 128)
SHAPE = (3072, 576)  # outputs, inputs: gate and up of SmolLM2-135M
STREAM_BYTES = 192 << 20  # of distinct weights, so that every one comes from memory
FORMATS = {
    "4-bit, min": (4, Correction.MIN),
    "4-bit, zero point": (4, Correction.ZERO_POINT),
    "8-bit, zero point": (8, Correction.ZERO_POINT),
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
    bound: str  # read or int8


def measure(module: ModuleType, limits: Limits, threads: int, repeats: int) -> Iterator[Measurement]:
    """Every format, from memory and from cache, for every number of rows."""
    n, k = SHAPE
    read, rate = limits.read_gbs[threads] * 1e9, limits.int8_tops[threads] * 1e12
    for weights, (bits, correction) in FORMATS.items():
        fmt = MatrixFormat(n, k, bits, correction)
        many = max(2, STREAM_BYTES // fmt.nbytes)
        # Small quants and scales of 1 (0x3c00 as float16): no denormals, whose arithmetic would be slower.
        data = np.full(many * fmt.nbytes, 0x3C, np.uint8)
        for source, copies in (("memory", many), ("cache", 1)):
            matrix = (data[: copies * fmt.nbytes], n, k, bits, correction is Correction.MIN)
            for rows in ROWS:
                turns = max(4, min(many, 4000 // rows))
                times = [module.time_matmul(matrix, copies, rows, turns, threads) / turns for _ in range(repeats)]
                time = statistics.median(times)
                operations = 2 * rows * n * k
                by_read = fmt.nbytes / read if source == "memory" else 0.0
                by_rate = operations / rate
                yield Measurement(
                    weights,
                    source,
                    rows,
                    time * 1e6,
                    fmt.nbytes / time * 1e-9,
                    operations / time * 1e-12,
                    max(by_read, by_rate) / time,
                    "read" if by_read > by_rate else "int8",
                )


def table_of(measurements: list[Measurement], limits: Limits, isa: str, threads: int) -> Table:
    """The figures, one line each, with the limits in the title."""
    n, k = SHAPE
    title = (
        f"{cpu_name()}, {isa}, {threads} thread(s): reads {limits.read_gbs[threads]:.1f} GB/s, "
        f"int8 {limits.int8_tops[threads]:.2f} TOP/s; projection K={k}, N={n}"
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

    limits = measure_limits(isa, args.threads, args.repeats)
    measurements = list(measure(native_build(isa), limits, args.threads, args.repeats))
    Console(width=140).print(table_of(measurements, limits, isa, args.threads))
    if args.json:
        figures = {"cpu": cpu_name(), "isa": isa, "threads": args.threads, "limits": asdict(limits)}
        write_json(args.json, figures | {"projections": [asdict(m) for m in measurements]})


if __name__ == "__main__":
    main()
