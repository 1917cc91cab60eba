"""The engine's core without a server, beside the machine's limits: `python -m benchmarks.engine --help`.

Decoding is bound by reading the weights once a step, prefill by int8 dot products; each line shows what it used of the
limit that binds it, measured on this machine just before. Overhead is the time of a step outside the kernels: the
scheduler, the arrays and the books, in Python. A second table says where the time inside them goes, and what the
projections use of the larger of their two limits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Limits, cpu_name, measure_limits, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from benchmarks.phases import Phases
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.request import Request, SamplingParams
from engine.weights import PackedModel

STREAMS = (1, 4, 16, 32)
DECODE_PROMPT = 32  # tokens each stream starts from
DECODE_STEPS = 64
PREFILL = (128, 512, 2048)  # tokens of one prompt
SEED = 20240607


@dataclass(frozen=True, slots=True)
class Measurement:
    """One load; figures are medians over the repeats."""

    load: str  # decode or prefill
    size: int  # streams, or tokens of the prompt
    tokens_per_second: float
    step_ms: float  # of the whole step, or of all steps of the prompt
    overhead_ms: float  # of it, outside the kernels
    used: float  # GB/s of weights, or 10**12 int8 operations a second
    share: float  # of the machine's limit
    phases: Mapping[str, float]  # ms of a step (of all steps of a prompt) by kind of phase; empty ones left out
    phase_shares: Mapping[str, float]  # of their limits, of the projections


class Load:
    """The model's core and the work that one token or one step means."""

    def __init__(self, model: PackedModel, limits: Limits, *, kv_cache_dtype: str, isa: str, threads: int) -> None:
        config = EngineConfig(
            max_num_seqs=max(STREAMS),
            kv_cache_tokens=max(STREAMS) * 256,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=False,
            speculation="off",  # a step is a token
            isa=isa,
            threads=threads,
        )
        self.core = EngineCore(config, model)
        self.phases = Phases(self.core, model)
        self.model = model.name
        self.title = f"{described(model)}, {kv_cache_dtype} keys and values"
        self.rng = np.random.default_rng(SEED)
        self.read_limit, self.int8_limit = limits.read_gbs[threads], limits.int8_tops[threads]
        spec = model.info.spec
        self.weight_bytes = sum(tensor.data.nbytes for tensor in model.weights.values())
        if not spec.tie_embeddings:  # of the embedding only a row a token is read
            self.weight_bytes -= model.weights["embed"].data.nbytes
        # Of a prompt every token goes through the layers, but only the last one through the head.
        shapes = [shape for name, shape in spec.tensor_shapes().items() if name.startswith("layers.")]
        self.operations_per_token = 2 * sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
        self.count = 0

    def add(self, length: int, max_tokens: int) -> None:
        self.count += 1
        self.core.add(
            Request(
                request_id=f"r{self.count}",
                model=self.model,
                prompt_token_ids=self.rng.integers(0, self.core.info.spec.vocab_size, length).tolist(),
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
                seed=self.count,
            )
        )

    def run(self, num_steps: int | None = None) -> tuple[float, float, int]:
        """Step so often, or until all is done: seconds, seconds of them inside the kernels, steps.

        The phases are those of these steps.
        """
        self.phases.start()
        before, start = self.core.stats(), time.perf_counter()
        while self.core.has_work and (num_steps is None or self.core.stats().num_steps - before.num_steps < num_steps):
            self.core.step()
        seconds, after = time.perf_counter() - start, self.core.stats()
        return seconds, after.step_seconds - before.step_seconds, after.num_steps - before.num_steps

    def decode(self, num_streams: int) -> Measurement:
        """All streams with their prompts behind them, so many steps of one token each."""
        for _ in range(num_streams):
            self.add(DECODE_PROMPT, max_tokens=DECODE_STEPS + 16)
        while self.core.stats().num_output_tokens < num_streams or self.core.stats().num_waiting:
            self.core.step()
        # A few more, until the last admitted stream decodes with the others.
        self.run(4)
        seconds, inside, steps = self.run(DECODE_STEPS)
        phases = self.phases.seconds()
        shares = self.phases.shares(steps, num_streams, num_streams, self.read_limit, self.int8_limit)
        self.run()
        used = self.weight_bytes * steps / seconds / 1e9
        return Measurement(
            load="decode",
            size=num_streams,
            tokens_per_second=num_streams * steps / seconds,
            step_ms=seconds / steps * 1e3,
            overhead_ms=(seconds - inside) / steps * 1e3,
            used=used,
            share=used / self.read_limit,
            phases={name: value / steps * 1e3 for name, value in phases.items()},
            phase_shares=shares,
        )

    def prefill(self, length: int) -> Measurement:
        """One prompt, from nothing to its first token."""
        self.add(length, max_tokens=1)
        seconds, inside, steps = self.run()
        phases = self.phases.seconds()
        shares = self.phases.shares(steps, -(-length // steps), 1, self.read_limit, self.int8_limit)
        used = self.operations_per_token * length / seconds / 1e12
        return Measurement(
            load="prefill",
            size=length,
            tokens_per_second=length / seconds,
            step_ms=seconds * 1e3,
            overhead_ms=(seconds - inside) * 1e3,
            used=used,
            share=used / self.int8_limit,
            phases={name: value * 1e3 for name, value in phases.items()},
            phase_shares=shares,
        )


def measure(load: Load, repeats: int) -> list[Measurement]:
    """Every load in turn, `repeats` times over, so that a slow minute of the machine spreads over all of them."""
    longest = load.core.max_model_len
    rounds: list[list[Measurement]] = []
    load.decode(1)  # not counted: the first steps touch the weights for the first time
    for _ in range(repeats):
        decoded = [load.decode(streams) for streams in STREAMS]
        rounds.append(decoded + [load.prefill(length) for length in PREFILL if length < longest])
    return [median(list(column)) for column in zip(*rounds, strict=True)]


def median(same: list[Measurement]) -> Measurement:
    def middle(field: str) -> float:
        return float(statistics.median(getattr(m, field) for m in same))

    def middles(field: str) -> dict[str, float]:
        return {name: statistics.median(getattr(m, field)[name] for m in same) for name in getattr(same[0], field)}

    fields = ("tokens_per_second", "step_ms", "overhead_ms", "used", "share")
    figures = {field: middle(field) for field in fields}
    return Measurement(
        load=same[0].load,
        size=same[0].size,
        phases=middles("phases"),
        phase_shares=middles("phase_shares"),
        **figures,
    )


def table_of(measurements: list[Measurement], load: Load, isa: str, threads: int) -> Table:
    table = Table(
        title=f"{load.title}, {isa}, {threads} threads, {cpu_name()}",
        caption=f"limits: {load.read_limit:.1f} GB/s read, {load.int8_limit:.3f} Tops/s int8",
    )
    for column in ("load", "tok/s", "ms", "overhead ms", "used", "share of limit"):
        table.add_column(column, justify="left" if column == "load" else "right")
    for m in measurements:
        decoding = m.load == "decode"
        table.add_row(
            f"decode, {m.size} stream{'s' * (m.size > 1)}" if decoding else f"prefill of {m.size} tokens",
            f"{m.tokens_per_second:.0f}",
            f"{m.step_ms:.2f}",
            f"{m.overhead_ms:.3f}",
            f"{m.used:.1f} GB/s" if decoding else f"{m.used:.3f} Tops/s",
            f"{m.share:.0%}",
        )
    return table


def breakdown_of(measurements: list[Measurement]) -> Table:
    """Where the time inside the kernels goes: ms, share of it, and of a projection its share of the limit."""
    table = Table(title="milliseconds inside the kernels (share of them; projections: share of their own limit)")
    table.add_column("phase")
    for m in measurements:
        table.add_column(f"{m.load} {m.size}", justify="right")
    for name in max((m.phases for m in measurements), key=len):
        cells = []
        for m in measurements:
            ms, total = m.phases.get(name, 0.0), sum(m.phases.values())
            limit = f"; {m.phase_shares[name]:.0%}" if name in m.phase_shares else ""
            cells.append(f"{ms:.3g} ({ms / total:.0%}{limit})")
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    args = parse_options(parser)
    isa: str = args.isa

    model = load(parser, args)
    limits = measure_limits(isa, args.threads, args.repeats)
    loaded = Load(model, limits, kv_cache_dtype=args.kv_cache_dtype, isa=isa, threads=args.threads)
    try:
        measurements = measure(loaded, args.repeats)
    finally:
        loaded.core.close()
        model.close()
    console = Console(width=160)
    console.print(table_of(measurements, loaded, isa, args.threads))
    console.print(breakdown_of(measurements))
    if args.json:
        figures = {"cpu": cpu_name(), "model": model.name, "quantization": args.quantization}
        figures |= {"isa": isa, "threads": args.threads, "kv_cache_dtype": args.kv_cache_dtype}
        figures |= {"limits": asdict(limits), "loads": [asdict(m) for m in measurements]}
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
