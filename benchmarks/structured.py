"""What a form costs: tokens per second of many streams, free and held to a JSON schema, in turn.

`python -m benchmarks.structured --help` tells the options.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass, replace

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_name, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from engine.config import SPECULATIONS, EngineConfig
from engine.core import EngineCore
from engine.request import Request, SamplingParams, StructuredOutputs
from engine.sampling.grammar import GrammarCompiler
from engine.text.model_text import ModelText
from engine.weights import PackedModel

STREAMS = 32
TOKENS = 128
"""Of every stream, in both cases: no answer ends by itself before."""

SCHEMA = {
    "type": "object",
    "properties": {
        "people": {
            "type": "array",
            "minItems": 40,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 24},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "role": {"enum": ["captain", "pilot", "cook", "sailor"]},
                    "email": {"type": "string", "format": "email"},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
                },
                "required": ["name", "age", "role", "email", "tags"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["people"],
    "additionalProperties": False,
}
PROMPT = "Describe the crew of ship number {} as JSON, with name, age, role, email and tags of everybody."


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the repeats; the rest over all of them."""

    free: float  # tokens per second
    constrained: float
    refused: float  # share of the tokens that were chosen again
    grammars_share: float  # of the constrained steps' time, on one processor
    guesses: dict[str, float]  # tokens per second of one constrained stream, by kind of speculation

    @property
    def ratio(self) -> float:
        return self.constrained / self.free


def measure(model: PackedModel, grammar: str, repeats: int, config: EngineConfig) -> Figures:
    text = ModelText.from_info(model.info)
    prompts = [text.encode_chat([{"role": "user", "content": PROMPT.format(i)}]) for i in range(STREAMS)]
    core = EngineCore(config, model)
    try:
        rates: dict[bool, list[float]] = {False: [], True: []}
        run(core, model.name, prompts, grammar, tokens=8)  # the vocabulary, once in the life of an engine
        before, constrained_seconds = core.stats(), 0.0
        for repeat in range(repeats):
            for constrained in (False, True) if repeat % 2 else (True, False):
                seconds = run(core, model.name, prompts, grammar if constrained else None)
                rates[constrained].append(STREAMS * TOKENS / seconds)
                constrained_seconds += seconds * constrained
        after = core.stats()
        masks, grammars = after.num_masks - before.num_masks, after.grammar_seconds - before.grammar_seconds
    finally:
        core.close()
    return Figures(
        free=statistics.median(rates[False]),
        constrained=statistics.median(rates[True]),
        refused=masks / (STREAMS * TOKENS * repeats),
        grammars_share=grammars / constrained_seconds,
        guesses=guesses(model, prompts[0], grammar, repeats, config),
    )


def guesses(
    model: PackedModel, prompt: list[int], grammar: str, repeats: int, config: EngineConfig
) -> dict[str, float]:
    """Tokens per second of one constrained stream with guesses and without, in turn; medians."""
    cores = {kind: EngineCore(replace(config, speculation=kind), model) for kind in SPECULATIONS}
    rates: dict[str, list[float]] = {kind: [] for kind in SPECULATIONS}
    try:
        for core in cores.values():
            run(core, model.name, [prompt], grammar, tokens=8)
        for _ in range(repeats):
            for kind, core in cores.items():
                rates[kind].append(TOKENS / run(core, model.name, [prompt], grammar))
    finally:
        for core in cores.values():
            core.close()
    return {kind: statistics.median(each) for kind, each in rates.items()}


def run(core: EngineCore, model: str, prompts: list[list[int]], grammar: str | None, tokens: int = TOKENS) -> float:
    """Seconds from the first to the last token of all streams at once. Raises RuntimeError where one ended early."""
    request = Request(
        request_id="",
        model=model,
        prompt_token_ids=[],
        sampling=SamplingParams(temperature=0.7, max_tokens=tokens, min_tokens=tokens),
        seed=1,
        grammar=grammar,
    )
    for index, prompt in enumerate(prompts):
        core.add(msgspec.structs.replace(request, request_id=str(index), prompt_token_ids=prompt, seed=index))
    num_tokens, begin = 0, 0.0
    while core.has_work:
        deltas = core.step()
        if deltas and not begin:
            begin = time.perf_counter()
        num_tokens += sum(len(delta.token_ids) for delta in deltas)
    seconds = time.perf_counter() - begin
    if num_tokens != tokens * len(prompts):
        raise RuntimeError(f"{tokens * len(prompts)} tokens were to come, {num_tokens} came")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    args = parse_options(parser)
    model = load(parser, args)
    try:
        with GrammarCompiler() as compiler:
            started = time.perf_counter()
            compiler.compile(StructuredOutputs(regex="warm"))
            start_seconds, started = time.perf_counter() - started, time.perf_counter()
            grammar = compiler.compile(StructuredOutputs(json=SCHEMA))
            check_seconds = time.perf_counter() - started
        figures = measure(
            model,
            grammar,
            args.repeats,
            EngineConfig(
                kv_cache_dtype=args.kv_cache_dtype,
                kv_cache_tokens=STREAMS * (TOKENS + 128),
                isa=args.isa,
                threads=args.threads,
            ),
        )
    finally:
        model.close()
    title = f"{described(model)}, {args.isa}, {args.threads} threads, {cpu_name()}"
    table = Table(title=f"{title}: {STREAMS} streams of {TOKENS} tokens")
    for column in ("free", "held to a schema", "ratio", "refused", "grammars, of a step's time"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{figures.free:.0f} tok/s",
        f"{figures.constrained:.0f} tok/s",
        f"{figures.ratio:.3f}",
        f"{figures.refused:.1%}",
        f"{figures.grammars_share:.1%}",
    )
    console = Console(width=140)
    console.print(table)
    of_one = ", ".join(f"{kind} {rate:.0f} tok/s" for kind, rate in figures.guesses.items())
    console.print(f"One stream held to the schema, by its guesses: {of_one}.")
    console.print(
        f"The checker starts in {start_seconds * 1e3:.0f} ms and checks the schema in {check_seconds * 1e3:.1f} ms."
    )
    if args.json:
        known = {"cpu": cpu_name(), "model": model.name, "isa": args.isa, "threads": args.threads}
        write_json(
            args.json, known | asdict(figures) | {"start_seconds": start_seconds, "check_seconds": check_seconds}
        )


if __name__ == "__main__":
    main()
