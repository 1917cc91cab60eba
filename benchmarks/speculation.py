"""What prompt lookup gains: seconds of whole answers with and without it, and what a guessed row costs of a step.

`python -m benchmarks.speculation --help` tells the options.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import cpu_name, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from engine.config import BLOCK_SIZE, SPECULATIONS, EngineConfig
from engine.core import EngineCore
from engine.kernels import create_program
from engine.kernels.batch import StepBatch
from engine.request import EngineStats, Request, SamplingParams
from engine.scheduler.lookup import ROW_COST, ROWS
from engine.text.model_text import ModelText
from engine.weights import PackedModel

CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius ** 2
    if shape.kind == "square":
        return shape.side ** 2
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError(shape.kind)
"""
REPORT = """The harbour office counted 412 ships in March, 380 in April and 455 in May. In March 31 of them carried
grain, in April 28 and in May 40. Storms closed the harbour on two days in March and on five in April; in May it was
open on every day. The new crane on the north pier, which lifts sixty tons, was tried on the third of April and has
worked since the ninth. Two captains complained of the depth at the south pier, which was measured at 7.2 metres in May.
"""
TASKS = {
    "edit code": f"Rename the function area to surface. Give back only the code.\n\n{CODE}",
    "summarize": f"Summarize this report.\n\n{REPORT * 3}",
    "quote": f"Copy the sentences about the crane and the south pier.\n\n{REPORT}",
    "tell a story": "Tell a long story about a ship that sails to an unknown island.",
    "answer": "List the planets of the solar system with one sentence about each.",
}
TEMPERATURES = (0.0, 0.7)
MAX_TOKENS = 256
CONTEXT = 300
"""Tokens before the steps whose rows are timed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One task at one temperature; seconds are medians over the repeats."""

    task: str
    temperature: float
    num_tokens: int
    num_steps: int  # with guesses
    num_guessed: int
    num_right: int
    seconds: dict[str, float]  # by kind of speculation

    @property
    def gain(self) -> float:
        return self.seconds["off"] / self.seconds["prompt-lookup"]


def row_costs(model: PackedModel, repeats: int, *, isa: str, threads: int) -> list[float]:
    """Seconds of a step of one request's 1, 2, ... ROWS tokens, in turn; medians."""
    spec = model.info.spec
    num_blocks = -(-(CONTEXT + ROWS) // BLOCK_SIZE)
    program = create_program(spec, model.weights, num_blocks=num_blocks, threads=threads, isa=isa)

    def step(start: int, num_tokens: int) -> float:
        batch = StepBatch(
            token_ids=np.arange(num_tokens, dtype=np.int32) % spec.vocab_size,
            positions=np.arange(start, start + num_tokens, dtype=np.int32),
            query_starts=np.array([0, num_tokens], np.int32),
            seq_lens=np.array([start + num_tokens], np.int32),
            block_tables=np.arange(num_blocks, dtype=np.int32).reshape(1, 1, -1),
            logits_rows=np.arange(num_tokens, dtype=np.int32),
            logits=np.empty((num_tokens, spec.vocab_size), np.float32),
        )
        begin = time.perf_counter()
        program.step(batch)
        return time.perf_counter() - begin

    try:
        step(0, CONTEXT)
        seconds: list[list[float]] = [[] for _ in range(ROWS)]
        for _ in range(8 * repeats):
            for rows in range(1, ROWS + 1):
                seconds[rows - 1].append(step(CONTEXT, rows))
        return [statistics.median(each) for each in seconds]
    finally:
        program.close()


def answers(model: PackedModel, repeats: int, *, kv_cache_dtype: str, isa: str, threads: int) -> list[Answer]:
    """Every task with and without guesses, in turn. Raises RuntimeError where the two give different tokens."""
    text = ModelText.from_info(model.info)
    cores = {
        speculation: EngineCore(
            EngineConfig(
                speculation=speculation,
                kv_cache_dtype=kv_cache_dtype,
                enable_prefix_caching=False,
                isa=isa,
                threads=threads,
            ),
            model,
        )
        for speculation in SPECULATIONS
    }
    try:
        return [
            _answer(cores, model.name, task, text.encode_chat([{"role": "user", "content": prompt}]), heat, repeats)
            for task, prompt in TASKS.items()
            for heat in TEMPERATURES
        ]
    finally:
        for core in cores.values():
            core.close()


def _answer(
    cores: dict[str, EngineCore], model: str, task: str, prompt: list[int], temperature: float, repeats: int
) -> Answer:
    seconds: dict[str, list[float]] = {speculation: [] for speculation in cores}
    tokens: dict[str, list[int]] = {}
    before: dict[str, EngineStats] = {}
    for _ in range(repeats):
        for speculation, core in cores.items():
            core.add(
                Request(
                    request_id="answer",
                    model=model,
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature),
                    seed=1,
                )
            )
            tokens[speculation] = []
            before[speculation] = core.stats()
            begin = time.perf_counter()
            while core.has_work:
                for delta in core.step():
                    tokens[speculation] += delta.token_ids
            seconds[speculation].append(time.perf_counter() - begin)
    if tokens["off"] != tokens["prompt-lookup"]:
        raise RuntimeError(f"{task}: guesses changed the answer")
    start, end = before["prompt-lookup"], cores["prompt-lookup"].stats()
    return Answer(
        task=task,
        temperature=temperature,
        num_tokens=len(tokens["off"]),
        num_steps=end.num_steps - start.num_steps,
        num_guessed=end.num_draft_tokens - start.num_draft_tokens,
        num_right=end.num_accepted_tokens - start.num_accepted_tokens,
        seconds={speculation: statistics.median(each) for speculation, each in seconds.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    args = parse_options(parser)
    model = load(parser, args)
    title = f"{described(model)}, {args.isa}, {args.threads} threads, {cpu_name()}"
    try:
        costs = row_costs(model, args.repeats, isa=args.isa, threads=args.threads)
        found = answers(model, args.repeats, kv_cache_dtype=args.kv_cache_dtype, isa=args.isa, threads=args.threads)
    finally:
        model.close()

    table = Table(title=f"{title}: guesses from the text")
    for column in ("task", "temperature", "tokens", "steps", "guessed", "right", "without", "with", "gain"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for a in found:
        counts = (str(a.num_tokens), str(a.num_steps), str(a.num_guessed), str(a.num_right))
        times = (f"{a.seconds['off']:.2f} s", f"{a.seconds['prompt-lookup']:.2f} s", f"{a.gain:.2f}x")
        table.add_row(a.task, str(a.temperature), *counts, *times)
    rows = Table(title=f"A step of one request's tokens; a guess is made where it holds more often than {ROW_COST:.0%}")
    rows.add_column("tokens")
    rows.add_column("ms", justify="right")
    rows.add_column("of a step, for the last one", justify="right")
    for index, seconds in enumerate(costs):
        more = f"{(seconds - costs[index - 1]) / costs[0]:.0%}" if index else ""
        rows.add_row(str(index + 1), f"{seconds * 1e3:.2f}", more)
    console = Console(width=140)
    console.print(table)
    console.print(rows)
    if args.json:
        figures = {"cpu": cpu_name(), "model": model.name, "isa": args.isa, "threads": args.threads}
        write_json(args.json, figures | {"row_seconds": costs, "answers": [asdict(a) for a in found]})


if __name__ == "__main__":
    main()
