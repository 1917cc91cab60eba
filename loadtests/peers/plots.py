"""The page's plots, by matplotlib: SVG without dates and with fixed ids, so that equal results give equal files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.peers import report, summary
from loadtests.peers.plan import context_name
from loadtests.peers.records import Results

COLORS = ("#0f62fe", "#da1e28", "#198038", "#8a3ffc")
SETTINGS = {"svg.hashsalt": "seraph", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3, "font.size": 10}


def draw(results: Results, folder: Path) -> None:
    """Write every file of `report.PLOTS` into `folder`."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _figure(1)
        _against_concurrency(axes[0], results, "tokens_per_second", "output tokens/s", 1.0)
        _save(figure, axes, folder / "throughput.svg")

        figure, axes = _figure(2)
        _against_concurrency(axes[0], results, "ttft", "time to first token, ms", 1e3)
        _against_concurrency(axes[1], results, "tpot", "time per output token, ms", 1e3)
        for ax in axes:
            ax.set_yscale("log")
        _save(figure, axes, folder / "latency.svg")

        figure, axes = _figure(1)
        tokens = report.contexts(results)
        for name, color in zip(report.systems(results), COLORS, strict=False):
            medians = (_median(results, name, context_name(n), "tokens_per_second") for n in tokens)
            _line(axes[0], results, name, color, tokens, list(medians), 1.0)
        axes[0].set_xscale("log", base=2)
        axes[0].set_xticks(tokens, [f"{n:,}" for n in tokens])
        axes[0].set(xlabel="tokens of context", ylabel="decoded tokens/s, one stream", ylim=(0, None))
        _save(figure, axes, folder / "context.svg")

        figure, axes = _figure(len(report.LOADS))
        for ax, (task, title) in zip(axes, report.LOADS.items(), strict=True):
            _bars(ax, results, task, title)
        _save(figure, axes, folder / "loads.svg")


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.0 * columns if columns > 1 else 7.0, 4.0), layout="constrained")
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def _save(figure: Figure, axes: Sequence[Axes], path: Path) -> None:
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _median(results: Results, system: str, task: str, figure: str) -> float | None:
    found = summary.middle(summary.values(results, system, task, figure))
    return found.median if found else None


def _line(
    ax: Axes,
    results: Results,
    name: str,
    color: str,
    xs: Sequence[int],
    ys: Sequence[float | None],
    scale: float,
) -> None:
    points = [(x, y * scale) for x, y in zip(xs, ys, strict=True) if y is not None]
    if points:
        ax.plot(*zip(*points, strict=True), marker="o", color=color, label=results.header.versions[name])


def _against_concurrency(ax: Axes, results: Results, figure: str, label: str, scale: float) -> None:
    streams = report.concurrency(results)
    for name, color in zip(report.systems(results), COLORS, strict=False):
        medians = [_median(results, name, "serve", f"{figure}@{n}") for n in streams]
        _line(ax, results, name, color, streams, medians, scale)
    ax.set_xscale("log", base=2)
    ax.set_xticks(streams, [str(n) for n in streams])
    ax.set(xlabel="streams at once", ylabel=label)
    if figure == "tokens_per_second":
        ax.set_ylim(0, None)


def _bars(ax: Axes, results: Results, task: str, title: str) -> None:
    rates = [(name, _median(results, name, task, "tokens_per_second")) for name in report.systems(results)]
    for place, ((name, rate), color) in enumerate(zip(rates, COLORS, strict=False)):
        if rate is not None:
            ax.bar(place, rate, color=color)
            ax.annotate(report.number(rate), (place, rate), ha="center", va="bottom", fontsize=8)
        ax.set_xticks(range(len(rates)), [name for name, _ in rates], fontsize=8)
    ax.set(title=title, ylabel="tokens/s")
