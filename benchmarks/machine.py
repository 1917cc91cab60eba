"""What this machine can do at the moment: the denominators that every figure is printed beside."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from engine.kernels.native import build

BYTES = 256 << 20
"""Read per measurement: several times any last-level cache of the machines this is meant for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Medians of interleaved measurements, by number of threads."""

    read_gbs: dict[int, float]  # GB/s of sequential reads
    int8_tops: dict[int, float]  # 10**12 operations a second of 4-bit by int8 dot products, from registers


def native_build(isa: str) -> ModuleType:
    """The extension module of a native build. Raises RuntimeError where it is not installed."""
    module = build(isa)
    if module is None:
        raise RuntimeError(f"the {isa} kernels are not installed; run `make build`")
    return module


def measure_limits(isa: str, threads: int, repeats: int = 5) -> Limits:
    """Measure with 1 to `threads` threads and the instructions of `isa`, each in turn, `repeats` times."""
    module = native_build(isa)
    reads: dict[int, list[float]] = {t: [] for t in range(1, threads + 1)}
    rates: dict[int, list[float]] = {t: [] for t in range(1, threads + 1)}
    for _ in range(repeats):
        for t in range(1, threads + 1):
            reads[t].append(module.read_bandwidth(BYTES, t))
            rates[t].append(module.int8_rate(t))
    return Limits(
        {t: statistics.median(values) for t, values in reads.items()},
        {t: statistics.median(values) for t, values in rates.items()},
    )


def cpu_name() -> str:
    """The processor's own name, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
