"""A closed loop of streamed chats against any OpenAI-compatible server: `python -m loadtests.throughput --help`.

Each of N streams sends its next request when its last one has ended, until all requests are done. Prompts are the same
from run to run, different from one another, and about 100 tokens long; answers have exactly `--tokens` tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass

import httpx

WORDS = (
    *("river", "stone", "window", "letter", "garden", "market", "winter", "bridge", "candle", "paper", "morning"),
    *("island", "engine", "silver", "story", "doctor", "music", "forest", "kitchen", "harbor", "question", "summer"),
    *("village", "answer", "mountain", "number", "color", "teacher", "animal", "picture", "country"),
)


@dataclass(slots=True)
class Stream:
    """What one request saw; times in seconds from its start."""

    first: float
    end: float
    tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. Rates count output tokens over the wall time of the whole run, prompts included."""

    concurrency: int
    requests: int
    seconds: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    tokens_per_second: float
    ttft_median: float  # seconds
    tpot_median: float  # seconds per token after the first


def prompt(seed: int, words: int = 75) -> str:
    """About 1.3 tokens a word, and every prompt differs from its first word on, so that no prefix is shared."""
    rng = random.Random(seed)
    return f"{rng.choice(WORDS)} {seed}: continue this list of words. " + " ".join(rng.choices(WORDS, k=words))


async def one(client: httpx.AsyncClient, model: str, seed: int, tokens: int) -> Stream:
    """Send one request and read its stream. Raises httpx.HTTPError or ValueError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt(seed)}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first = 0.0
    usage: dict[str, object] = {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            if not first:
                # The first chunk that carries text; parsed only until it has come, so that the client stays cheap.
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter() - start
            elif '"usage":{' in line or '"usage": {' in line:
                usage = json.loads(line[6:])["usage"]
    end = time.perf_counter() - start
    produced = int(str(usage.get("completion_tokens", 0)))
    if produced != tokens:
        raise ValueError(f"expected {tokens} tokens, got {produced}")
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") or 0 if isinstance(details, dict) else 0
    return Stream(first, end, produced, int(str(usage["prompt_tokens"])), cached)


async def run(url: str, model: str, concurrency: int, requests: int, tokens: int, first_seed: int) -> Figures:
    """Run the closed loop once."""
    seeds = iter(range(first_seed, first_seed + requests))
    streams: list[Stream] = []
    # A connection per request: some servers close theirs after a stream, and a reused one then fails.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:

        async def worker() -> None:
            # `seeds` is one iterator for all workers: each takes the next prompt when its last answer has ended.
            streams.extend([await one(client, model, seed, tokens) for seed in seeds])

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        seconds = time.perf_counter() - start
    output = sum(s.tokens for s in streams)
    return Figures(
        concurrency=concurrency,
        requests=requests,
        seconds=seconds,
        output_tokens=output,
        prompt_tokens=sum(s.prompt_tokens for s in streams),
        cached_tokens=sum(s.cached_tokens for s in streams),
        tokens_per_second=output / seconds,
        ttft_median=statistics.median(s.first for s in streams),
        tpot_median=statistics.median((s.end - s.first) / max(1, s.tokens - 1) for s in streams),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--requests", type=int, help="default: twice the concurrency, at least 3")
    parser.add_argument("--tokens", type=int, default=128, help="output tokens of each request")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; another one avoids a prefix cache")
    args = parser.parse_args()
    seed = args.seed
    for concurrency in args.concurrency:
        requests = args.requests or max(3, 2 * concurrency)
        try:
            figures = asyncio.run(run(args.url, args.model, concurrency, requests, args.tokens, seed))
        except* (httpx.HTTPError, ValueError) as group:
            parser.exit(1, f"{args.url}: {group.exceptions[0]!r}\n")
        seed += requests
        print(json.dumps(asdict(figures)), flush=True)


if __name__ == "__main__":
    main()
