"""What this machine can do at the moment: the denominators that every figure is printed beside."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from engine.config import available_cpus
from engine.errors import ConfigError
from engine.kernels import available_isas, select_isa
from engine.kernels.native import build

BYTES = 256 << 20
"""Read per measurement: several times any last-level cache of the machines this is meant for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Medians of interleaved measurements, by number of threads."""

    read_gbs: dict[int, float]  # GB/s of sequential reads
    int8_tops: dict[int, float]  # 10**12 operations a second of 4-bit by int8 dot products, from registers
    float32_tops: dict[int, float]  # the same of float32 multiply-adds
    bf16_tops: dict[int, float]  # of dot products of bfloat16 pairs; 0 where there are none


def native_build(isa: str) -> ModuleType:
    """The extension module of a native build. Raises RuntimeError where it is not installed."""
    module = build(isa)
    if module is None:
        raise RuntimeError(f"the {isa} kernels are not installed; run `make build`")
    return module


def measure_limits(isa: str, threads: int, repeats: int = 5) -> Limits:
    """Measure with 1 to `threads` threads and the instructions of `isa`, each in turn, `repeats` times."""
    module = native_build(isa)
    counts = range(1, threads + 1)
    rates = {name: getattr(module, name) for name in ("int8_rate", "float32_rate", "bf16_rate")}
    rates["read_bandwidth"] = lambda t: module.read_bandwidth(BYTES, t)
    found: dict[str, dict[int, list[float]]] = {name: {t: [] for t in counts} for name in rates}
    for _ in range(repeats):
        for t in counts:
            for name, rate in rates.items():
                found[name][t].append(rate(t))

    def medians(name: str) -> dict[int, float]:
        return {t: statistics.median(values) for t, values in found[name].items()}

    return Limits(medians("read_bandwidth"), medians("int8_rate"), medians("float32_rate"), medians("bf16_rate"))


def cpu_name() -> str:
    """The processor's own name, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def parse_options(parser: argparse.ArgumentParser, *, repeated: bool = True) -> argparse.Namespace:
    """Parse the command line with the options that every benchmark has; `isa` comes back resolved to a native build.

    `repeated`: whether figures are medians, whose number of measurements is an option then.
    """
    parser.add_argument("--isa", default="auto", help=f"auto or one of {', '.join(available_isas())}")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="default: every CPU of this process")
    if repeated:
        parser.add_argument("--repeats", type=int, default=5, help="measurements of which the median is shown")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    try:
        args.isa = select_isa(args.isa)
    except ConfigError as error:
        parser.error(str(error))
    if args.isa == "reference" or args.threads < 1 or (repeated and args.repeats < 1):
        parser.error("a native build, at least one thread and at least one repeat are needed")
    return args


def write_json(path: Path, figures: Mapping[str, object]) -> None:
    """Write figures to a file, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n")
