"""A closed loop of streamed chats against any OpenAI-compatible server: `python -m loadtests.throughput --help`.

Each of N streams sends its next request when its last one has ended, until all requests are done. Prompts are the same
from run to run, different from one another, and about 100 tokens long; answers have exactly `--tokens` tokens, or, with
`--spread`, lengths around that which are the same from run to run as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools

WORDS = (
    *("river", "stone", "window", "letter", "garden", "market", "winter", "bridge", "candle", "paper", "morning"),
    *("island", "engine", "silver", "story", "doctor", "music", "forest", "kitchen", "harbor", "question", "summer"),
    *("village", "answer", "mountain", "number", "color", "teacher", "animal", "picture", "country"),
)

TIMEOUT = 600.0
"""Seconds that one answer may take."""


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


class Answer(asyncio.Protocol):
    """Sends one request over a connection of its own and hears a streamed answer out.

    What hears the answers shares the CPUs with the server that is measured, so it costs as little as it can: HTTP is
    parsed in C, events only until the first one with text has come, and the one with the usage at the end.
    `ended` gets None, or the OSError or ValueError that kept the answer from being whole.
    """

    TAIL = 8192
    """Bytes of the end of an answer that are kept: usage is in one of its last events."""

    def __init__(self, message: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.start = time.perf_counter()
        self.first = 0.0  # seconds from the start to the first text; 0 before
        self._message = message
        self._parser = httptools.HttpResponseParser(self)
        self._tail = b""  # before the first text, what follows the last whole line

    def usage(self) -> dict[str, Any]:
        """Of an answer that is whole, what it says that it used; empty where it does not say."""
        for line in reversed(self._tail.split(b"\n")):
            if line.startswith(b"data: {") and (usage := json.loads(line[6:]).get("usage")):
                return dict(usage)
        return {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(ValueError(f"no HTTP: {error.__context__ or error!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionError("the connection was closed before the answer was whole"))

    def on_body(self, body: bytes) -> None:
        self._tail += body
        if not self.first and self._parser.get_status_code() == 200:
            lines, _, rest = self._tail.rpartition(b"\n")
            if any(map(_has_text, lines.split(b"\n"))):
                self.first = time.perf_counter() - self.start  # what is left may be all of the answer
            else:
                self._tail = rest
        self._tail = self._tail[-self.TAIL :]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self._end(None if status == 200 else ValueError(f"status {status}: {self._tail[:300]!r}"))

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def _has_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[6:])["choices"]
    return bool(choices and choices[0]["delta"].get("content"))


async def one(url: str, model: str, seed: int, tokens: int) -> Stream:
    """Send one request and read its stream. Raises OSError or ValueError."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt(seed)}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    where = urlsplit(url)
    if where.scheme not in ("http", "https") or where.hostname is None:
        raise ValueError(f"expected http://HOST:PORT, got {url!r}")
    content = json.dumps(body).encode()
    head = (
        f"POST {where.path.rstrip('/')}/v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    # A connection per request: some servers close theirs after a stream, and a reused one then fails.
    secure = where.scheme == "https"
    port = where.port or (443 if secure else 80)
    answer = Answer(head.encode() + content)
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: answer, where.hostname, port, ssl=True if secure else None
    )
    try:
        async with asyncio.timeout(TIMEOUT):
            await answer.ended
    finally:
        transport.abort()
    end = time.perf_counter() - answer.start
    usage = answer.usage()
    produced = int(usage.get("completion_tokens", 0))
    if produced != tokens:
        raise ValueError(f"expected {tokens} tokens, got {produced}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Stream(answer.first, end, produced, int(usage["prompt_tokens"]), int(cached))


def length(seed: int, tokens: int, spread: float) -> int:
    """Tokens of an answer: between `tokens` times 1 - `spread` and times 1 + `spread`.

    With answers of one length all streams ask at the same moment again and again, and the time to the first token is
    that of a crowd. With others they ask one by one, as callers do.
    """
    return round(tokens * random.Random(f"length {seed}").uniform(1 - spread, 1 + spread))


async def run(
    url: str, model: str, concurrency: int, requests: int, tokens: int, first_seed: int, spread: float = 0.0
) -> Figures:
    """Run the closed loop once."""
    seeds = iter(range(first_seed, first_seed + requests))
    streams: list[Stream] = []

    async def worker() -> None:
        # `seeds` is one iterator for all workers: each takes the next prompt when its last answer has ended.
        streams.extend([await one(url, model, seed, length(seed, tokens, spread)) for seed in seeds])

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
    parser.add_argument(
        "--spread", type=float, default=0.0, help="of answers' lengths, as 0.5: 0.5 to 1.5 times as long"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; another one avoids a prefix cache")
    args = parser.parse_args()
    seed = args.seed
    for concurrency in args.concurrency:
        requests = args.requests or max(3, 2 * concurrency)
        try:
            figures = asyncio.run(run(args.url, args.model, concurrency, requests, args.tokens, seed, args.spread))
        except* (OSError, ValueError) as group:
            parser.exit(1, f"{args.url}: {group.exceptions[0]!r}\n")
        seed += requests
        print(json.dumps(asdict(figures)), flush=True)


if __name__ == "__main__":
    main()
