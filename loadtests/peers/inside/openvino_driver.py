"""Runs inside OpenVINO GenAI's environment: `python openvino_driver.py MODEL`, then a JSON task per line on stdin.

Each answer is a line of JSON. The continuous batching pipeline is stepped from here, so that a closed loop of requests
and the steps in which all streams decode can be told apart by the clock.

It imports nothing of this repository, and stands in a folder of its own: Python looks for `openvino` beside it first.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openvino
import openvino_genai


class Stream:
    """A request: when it was sent, and when its first and last token came."""

    def __init__(self, handle: Any, tokens: int) -> None:
        self.handle = handle
        self.missing = tokens
        self.start = time.perf_counter()
        self.first = 0.0
        self.last = 0.0

    def read(self) -> None:
        if self.handle.can_read():
            now = time.perf_counter()
            came = sum(len(output.generated_ids) for output in self.handle.read().values())
            self.first = self.first or now
            self.last = now
            self.missing -= came


class Driver:
    def __init__(self, model: str, cache_gib: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = cache_gib
        scheduler.max_num_seqs = 256
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU")
        self.tokenizer = self.pipeline.get_tokenizer()
        self.count = 0

    def add(self, prompt: Any, tokens: int) -> Stream:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.do_sample = False
        config.ignore_eos = True
        self.count += 1
        return Stream(self.pipeline.add_request(self.count, prompt, config), tokens)

    def step(self, streams: list[Stream]) -> None:
        if not self.pipeline.has_non_finished_requests():
            raise RuntimeError(f"{len(streams)} streams are not done, but the pipeline is")
        self.pipeline.step()
        for stream in streams:
            stream.read()

    def chats(self, task: dict[str, Any]) -> dict[str, float]:
        """A closed loop: `streams` at a time, until all of `prompts` are answered."""
        waiting: Iterator[str] = iter(task["prompts"])
        active: list[Stream] = []
        done: list[Stream] = []
        sizes: list[int] = []

        def send() -> None:
            if (text := next(waiting, None)) is not None:
                message = [{"role": "user", "content": text}]
                rendered = self.tokenizer.apply_chat_template(message, add_generation_prompt=True)
                ids = self.tokenizer.encode(rendered, add_special_tokens=False).input_ids
                sizes.append(ids.shape[1])
                active.append(self.add(ids, task["tokens"]))

        begin = time.perf_counter()
        for _ in range(task["streams"]):
            send()
        while active:
            self.step(active)
            for stream in [stream for stream in active if stream.missing <= 0]:
                active.remove(stream)
                done.append(stream)
                send()
        seconds = time.perf_counter() - begin
        return {
            "tokens_per_second": task["tokens"] * len(done) / seconds,
            "ttft": statistics.median(stream.first - stream.start for stream in done),
            "tpot": statistics.median((s.last - s.first) / max(1, task["tokens"] - 1) for s in done),
            "prompt_tokens": statistics.fmean(sizes),
        }

    def tokens(self, task: dict[str, Any]) -> dict[str, float]:
        """Prompts of token ids at once. A decode counts the steps after the last stream's first token."""
        prompts = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in task["prompts"]]
        streams = [self.add(prompt, task["tokens"]) for prompt in prompts]
        while not all(stream.first for stream in streams):
            self.step(streams)
        if task["kind"] == "prefill":
            (stream,) = streams
            return {"tokens_per_second": len(task["prompts"][0]) / (stream.first - stream.start)}
        begin, before = time.perf_counter(), sum(stream.missing for stream in streams)
        while all(stream.missing > 0 for stream in streams):
            self.step(streams)
        seconds, decoded = time.perf_counter() - begin, before - sum(stream.missing for stream in streams)
        while any(stream.missing > 0 for stream in streams):
            self.step(streams)
        return {"tokens_per_second": decoded / seconds}


def main(model: str, cache_gib: int) -> None:
    driver = Driver(model, cache_gib)
    does: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
        "serve": driver.chats,
        "prefill": driver.tokens,
        "decode": driver.tokens,
    }
    for line in sys.stdin:
        task = json.loads(line)
        print(json.dumps(does[task["kind"]](task)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
