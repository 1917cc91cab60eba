"""How well a program predicts a text: the one figure that every rounding in weights and arithmetic shows in.

`python -m benchmarks.perplexity TEXT` says it of a model and a file; `--help` tells the rest.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.machine import cpu_name, parse_options, write_json
from benchmarks.models import add_model_options, described, load
from engine.config import BLOCK_SIZE
from engine.kernels import create_program
from engine.kernels.batch import Program, StepBatch
from engine.models.spec import DecoderSpec

WINDOW = 1024

CHUNK = 256
"""Tokens of one step; bounds the logits buffer."""


def perplexity(
    program: Program, spec: DecoderSpec, token_ids: Sequence[int] | NDArray[np.integer], window: int
) -> float:
    """exp of the mean negative log likelihood of every token that has one before it in its window."""
    sums, counts = zip(*windows_nll(program, spec, token_ids, window), strict=True)
    return math.exp(math.fsum(sums) / sum(counts))


def windows_nll(
    program: Program, spec: DecoderSpec, token_ids: Sequence[int] | NDArray[np.integer], window: int
) -> list[tuple[float, int]]:
    """For each window: the summed negative log likelihood (natural logarithm) and the number of predicted tokens.

    The text is cut into windows of `window` tokens (the last may be shorter), each read from an empty context.
    Overwrites the program's first KV blocks. Raises ValueError where the text or the program's memory is too short.
    """
    ids = np.asarray(token_ids, np.int32)
    blocks_needed = -(-window // BLOCK_SIZE)
    if window < 2 or len(ids) < 2:
        raise ValueError(f"perplexity needs a window and a text of at least 2 tokens, got {window} and {len(ids)}")
    if program.num_blocks < blocks_needed:
        raise ValueError(f"a window of {window} tokens needs {blocks_needed} KV blocks, got {program.num_blocks}")
    table = np.arange(blocks_needed, dtype=np.int32).reshape(1, 1, -1)
    results = []
    for begin in range(0, len(ids) - 1, window):
        text = ids[begin : begin + window]
        total = 0.0
        for start in range(0, len(text), CHUNK):
            chunk = text[start : start + CHUNK]
            logits = np.empty((len(chunk), spec.vocab_size), np.float32)
            program.step(
                StepBatch(
                    token_ids=chunk.copy(),
                    positions=np.arange(start, start + len(chunk), dtype=np.int32),
                    query_starts=np.array([0, len(chunk)], np.int32),
                    seq_lens=np.array([start + len(chunk)], np.int32),
                    block_tables=table,
                    logits_rows=np.arange(len(chunk), dtype=np.int32),
                    logits=logits,
                )
            )
            targets = text[start + 1 : start + 1 + len(chunk)]  # the window's last token predicts nothing
            total += float(_nll(logits[: len(targets)], targets).sum())
        results.append((total, len(text) - 1))
    return results


def _nll(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """Negative log likelihood of `targets` [M] under rows of logits [M, vocab]; float64 [M]. Overwrites `logits`."""
    largest = logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64) - largest[:, 0]
    np.subtract(logits, largest, out=logits)
    np.exp(logits, out=logits)
    masses: NDArray[np.float64] = logits.sum(axis=1, dtype=np.float64)
    nll: NDArray[np.float64] = np.log(masses) - chosen
    return nll


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of a model on a text, each window from an empty context.")
    parser.add_argument("text", type=Path, help="a file in UTF-8")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens read together (default: %(default)s)")
    add_model_options(parser)
    args = parse_options(parser, repeated=False)

    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"cannot read {args.text}: {error}")
    model = load(parser, args)
    spec = model.info.spec
    if not 2 <= args.window <= spec.max_position:
        parser.error(f"--window must be from 2 to the model's {spec.max_position} positions, got {args.window}")
    token_ids = Tokenizer.from_str(model.info.tokenizer_json).encode(text, add_special_tokens=False).ids
    if len(token_ids) < 2:
        parser.error(f"{args.text} must hold at least 2 tokens, got {len(token_ids)}")
    num_blocks = -(-args.window // BLOCK_SIZE)
    program = create_program(
        spec,
        model.weights,
        num_blocks=num_blocks,
        threads=args.threads,
        isa=args.isa,
        kv_dtype=args.kv_cache_dtype,
    )
    start = time.perf_counter()
    try:
        value = perplexity(program, spec, token_ids, args.window)
    finally:
        program.close()
        model.close()
    rate = len(token_ids) / (time.perf_counter() - start)
    print(
        f"{described(model)}, {args.isa}: perplexity {value:.4f} of {len(token_ids)} tokens in windows of "
        f"{args.window} ({rate:.0f} tok/s)"
    )
    if args.json:
        figures = {"cpu": cpu_name(), "model": model.name, "quantization": args.quantization, "isa": args.isa}
        figures |= {"text": args.text.name, "tokens": len(token_ids), "window": args.window, "perplexity": value}
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
