"""Milliseconds that one row of logits takes to become a token: `python -m benchmarks.sampler --help`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_name, native_build, parse_options, write_json
from engine.kernels.batch import Float32, SamplingArrays
from engine.kernels.native import native_sampling

ROWS = 16
VOCABULARIES = (49_152, 262_144)
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 40": {"top_k": 40},
    "top_k 5000": {"top_k": 5000},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 40, top_p 0.95": {"top_k": 40, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "all of them": {"top_k": 1000, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
}
# How logits lie decides how long a search for a limit takes.
LOGITS: dict[str, Callable[[np.random.Generator, int], Float32]] = {
    "as a model's": lambda rng, vocab: (rng.gumbel(size=(ROWS, vocab)) * 2).astype(np.float32),
    "flat": lambda rng, vocab: (rng.normal(size=(ROWS, vocab)) * 0.1).astype(np.float32),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """Median milliseconds of a row."""

    vocabulary: int
    logits: str
    setting: str
    milliseconds: float


def sampling_of(vocab: int, setting: dict[str, float]) -> SamplingArrays:
    """The same setting for every row, with 64 tokens of history."""

    def full(name: str, default: float, dtype: type = np.float32) -> Any:
        return np.full(ROWS, setting.get(name, default), dtype)

    history = 64
    none = np.zeros(ROWS + 1, np.int32)
    starts = np.arange(ROWS + 1, dtype=np.int32) * history
    return SamplingArrays(
        temperature=full("temperature", 1.0),
        top_k=full("top_k", 0, np.int32),
        top_p=full("top_p", 1.0),
        min_p=full("min_p", 0.0),
        repetition_penalty=full("repetition_penalty", 1.0),
        presence_penalty=full("presence_penalty", 0.0),
        frequency_penalty=full("frequency_penalty", 0.0),
        seed=np.arange(ROWS, dtype=np.uint64),
        choice=np.zeros(ROWS, np.int32),
        position=np.arange(ROWS, dtype=np.int32),
        history_starts=starts if "repetition_penalty" in setting else none,
        history_output_starts=starts[1:] if "repetition_penalty" in setting else none[1:],
        history_tokens=np.arange(ROWS * history if "repetition_penalty" in setting else 0, dtype=np.int32) % vocab,
        bias_starts=none,
        bias_tokens=np.empty(0, np.int32),
        bias_values=np.empty(0, np.float32),
    )


def measure(module: ModuleType, repeats: int) -> list[Measurement]:
    """Every setting in turn, `repeats` times over."""
    rng = np.random.default_rng(7)
    chosen = np.empty(ROWS, np.int32)
    found: dict[tuple[int, str, str], list[float]] = {}
    for vocab in VOCABULARIES:
        rows = {name: make(rng, vocab) for name, make in LOGITS.items()}
        hows = {name: native_sampling(module, sampling_of(vocab, setting)) for name, setting in SETTINGS.items()}
        for _ in range(repeats):
            for lie, logits in rows.items():
                for name, how in hows.items():
                    start = time.perf_counter()
                    module.sample(logits, how, chosen)
                    found.setdefault((vocab, lie, name), []).append(time.perf_counter() - start)
    return [Measurement(*key, statistics.median(seconds) / ROWS * 1e3) for key, seconds in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = parse_options(parser)
    measurements = measure(native_build(args.isa), args.repeats)
    columns = [(vocab, lie) for vocab in VOCABULARIES for lie in LOGITS]
    table = Table(title=f"{cpu_name()}, {args.isa}, one thread: milliseconds a row")
    table.add_column("setting")
    for vocab, lie in columns:
        table.add_column(f"{vocab:,}, logits {lie}", justify="right")
    figures = {(m.vocabulary, m.logits, m.setting): m.milliseconds for m in measurements}
    for name in SETTINGS:
        table.add_row(name, *(f"{figures[vocab, lie, name]:.3f}" for vocab, lie in columns))
    Console(width=140).print(table)
    if args.json:
        write_json(
            args.json,
            {"cpu": cpu_name(), "isa": args.isa, "rows": {str(key): value for key, value in figures.items()}},
        )


if __name__ == "__main__":
    main()
