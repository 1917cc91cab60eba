"""One load on the engine without a server, once, as a line of JSON: `python -m benchmarks.offline --help`.

For harnesses that start it beside other systems: the process measures what it was asked for and ends. Decode counts
the steps in which all streams decode; prefill is one prompt from nothing to its first token. The best kernels have to
read every weight once a step, and the keys and values of every stream: `share` is what decoding reached of the read
bandwidth, measured just before and just after it. `ms.<phase>` is the time of a step (of all steps of a prompt) in
each kind of phase of the kernels, `ms.outside` what is left, and `limit.<phase>` what projections use of the larger of
their two limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.machine import BYTES, native_build, parse_options
from benchmarks.models import add_model_options, load
from benchmarks.phases import Phases
from engine.config import BLOCK_SIZE, EngineConfig
from engine.core import EngineCore
from engine.models.spec import EncoderSpec
from engine.request import Request, SamplingParams
from engine.weights import PackedModel

SEED = 20240607
WARM_TOKENS = 8


class Bench:
    """A core of the model with room for so many streams of so many tokens, perhaps with an encoder beside it."""

    def __init__(
        self,
        model: PackedModel,
        encoder: PackedModel[EncoderSpec] | None = None,
        *,
        streams: int,
        length: int,
        kv_cache_dtype: str,
        isa: str,
        threads: int,
        tensor_parallel_size: int | None = None,
    ) -> None:
        blocks = -(-(length + WARM_TOKENS + 1) // BLOCK_SIZE) + 1
        self.core = EngineCore(
            EngineConfig(
                max_num_seqs=max(streams, 1),
                kv_cache_tokens=streams * blocks * BLOCK_SIZE,
                kv_cache_dtype=kv_cache_dtype,
                enable_prefix_caching=False,
                speculation="off",  # a step is a token
                isa=isa,
                threads=threads,
                tensor_parallel_size=tensor_parallel_size,
            ),
            model,
            encoder,
        )
        self.model = model
        self.module, self.threads = native_build(isa), threads
        self.phases = Phases(self.core, model)
        self.rng = np.random.default_rng(SEED)
        self.count = 0

    def add(self, length: int, max_tokens: int, logprobs: int | None = None) -> None:
        self.count += 1
        self.core.add(
            Request(
                request_id=f"r{self.count}",
                model=self.model.name,
                prompt_token_ids=self.rng.integers(0, self.core.info.spec.vocab_size, length).tolist(),
                sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs),
                seed=self.count,
            )
        )

    def finish(self) -> None:
        while self.core.has_work:
            self.core.step()

    def bandwidth(self) -> float:
        """GB/s of sequential reads at the moment."""
        return statistics.median(float(self.module.read_bandwidth(BYTES, self.threads)) for _ in range(3))

    def int8_rate(self) -> float:
        """Tops/s of int8 dot products at the moment."""
        return float(self.module.int8_rate(self.threads))

    def bytes_per_step(self, streams: int, context: float) -> float:
        """Weights, and keys and values of all streams at a mean `context`."""
        spec = self.core.info.spec
        weights = sum(tensor.data.nbytes for tensor in self.model.weights.values())
        if not spec.tie_embeddings:  # of the embedding only a row a token is read
            weights -= self.model.weights["embed"].data.nbytes
        return weights + streams * context * spec.kv_bytes_per_token(self.core.config.kv_cache_dtype)

    def decode(self, streams: int, prompt: int, tokens: int, logprobs: int | None = None) -> dict[str, float]:
        """`streams` prompts of `prompt` tokens behind them, then steps in which all of them decode."""
        self.add(BLOCK_SIZE, WARM_TOKENS)  # touches all weights for the first time
        self.finish()
        before = self.bandwidth()
        for _ in range(streams):
            self.add(prompt, tokens + 1, logprobs)
        # A stream that was admitted first has decoded while others were still at their prompts: what counts is the
        # time from the step in which the last one got its first token.
        seen: set[str] = set()
        while len(seen) < streams:
            seen.update(delta.request_id for delta in self.core.step() if delta.token_ids)
        start = self.core.stats()
        self.phases.start()
        clock = time.perf_counter()
        while self.core.stats().num_running == streams and self.core.has_work:
            self.core.step()
        seconds = time.perf_counter() - clock
        end = self.core.stats()
        steps, phases = end.num_steps - start.num_steps, self.phases.seconds()
        gbs, tops = statistics.fmean((before, self.bandwidth())), self.int8_rate()
        limits = self.phases.shares(steps, streams, streams, gbs, tops)
        self.finish()
        rate = (end.num_output_tokens - start.num_output_tokens) / seconds
        needed = self.bytes_per_step(streams, prompt + tokens / 2) / 1e9
        figures = {"tokens_per_second": rate, "read_gbs": gbs, "share": rate / streams * needed / gbs}
        return figures | breakdown(phases, limits, seconds, steps)

    def prefill(self, length: int) -> dict[str, float]:
        """One prompt, the second of its kind."""
        for _ in range(2):
            self.add(length, 1)
            before = self.core.stats().num_steps
            self.phases.start()
            clock = time.perf_counter()
            self.finish()
            seconds = time.perf_counter() - clock
        steps, phases = self.core.stats().num_steps - before, self.phases.seconds()
        tops = self.int8_rate()
        limits = self.phases.shares(steps, -(-length // steps), 1, self.bandwidth(), tops)
        return {"tokens_per_second": length / seconds, "int8_tops": tops} | breakdown(phases, limits, seconds, 1)


def breakdown(phases: dict[str, float], limits: dict[str, float], seconds: float, steps: int) -> dict[str, float]:
    """Milliseconds of one of `steps` steps that took `seconds` in all, by phase; the projections' shares."""
    figures = {f"ms.{name}": value / steps * 1e3 for name, value in phases.items()}
    figures["ms.outside"] = (seconds - sum(phases.values())) / steps * 1e3
    return figures | {f"limit.{name}": share for name, share in limits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=("decode", "prefill"))
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=BLOCK_SIZE, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="decoded tokens of each stream")
    parser.add_argument("--logprobs", type=int, help="while decoding, log-probabilities with so many of the best")
    add_model_options(parser)
    args = parse_options(parser, repeated=False)
    if min(args.streams, args.prompt, args.tokens) < 1:
        parser.error("streams, prompt and tokens must be at least 1")
    model = load(parser, args)
    length = args.prompt + args.tokens
    bench = Bench(
        model,
        streams=args.streams,
        length=length,
        kv_cache_dtype=args.kv_cache_dtype,
        isa=args.isa,
        threads=args.threads,
    )
    try:
        if args.load == "decode":
            figures = bench.decode(args.streams, args.prompt, args.tokens, args.logprobs)
        else:
            figures = bench.prefill(args.prompt)
    finally:
        bench.core.close()
        model.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
