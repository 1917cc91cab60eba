"""The roofline plot of `benchmarks.kernels`, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.machine import Limits

COLORS = {"any": "#0f62fe", "SmolLM2-135M": "#198038", "Llama-3.2-1B": "#8a3ffc", "Mistral-7B": "#da1e28"}
MARKERS = {"memory": "o", "cache": "x"}


def draw(path: Path, limits: Limits, threads: int, measurements: Sequence[Mapping[str, Any]]) -> None:
    """Rate against operations per byte of weights, under what reading and int8 dot products allow (Williams et al.,
    2009). `measurements`: those of `benchmarks.kernels` with quants, as plain data."""
    read, rate = limits.read_gbs[threads] * 1e-3, limits.int8_tops[threads]  # both in units of 10**12
    with matplotlib.rc_context(
        {"svg.hashsalt": "seraph", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3}
    ):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        intensities = [1.0, rate / read, 1000.0]
        axes.plot(intensities, [min(rate, read * x) for x in intensities], color="black", label="limit, from memory")
        axes.axhline(rate, color="black", linestyle=":", label="limit, from cache")
        seen = set()
        for m in measurements:
            case = m["case"]
            if case["weights"] == "bfloat16":
                continue  # multiplied as float32, under another roof
            group = case["projection"].split(" ")[0]
            label = f"{group}, {case['source']}".replace("any", "3072 x 576, any format")
            axes.plot(
                [m["tera_operations"] / m["gigabytes_per_second"] * 1e3],
                [m["tera_operations"]],
                MARKERS[case["source"]],
                color=COLORS[group],
                label=None if label in seen else label,
            )
            seen.add(label)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", ylabel="10$^{12}$ operations/s")
        axes.legend(fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
