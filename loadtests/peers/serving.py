"""Measuring a server that speaks the OpenAI API: started, asked, and stopped again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from loadtests import throughput
from loadtests.peers.plan import Task, first_seed, num_requests
from loadtests.peers.processes import Child, SystemFailure, cpu_seconds, free_port, members, resident_mb, running
from loadtests.peers.systems import Figures

MODEL = "smollm2-135m-instruct"
POLL_SECONDS = 0.01
FIRST_ID, LAST_ID = 100, 40_000
"""Bounds of the token ids that random prompts are made of: words, none with a meaning of its own to the model."""


@dataclass(frozen=True, slots=True)
class Server:
    """How a server is started; "{port}" in the command stands for its port."""

    command: Sequence[object]
    environment: Mapping[str, str]
    log: Path
    folder: Path | None = None


def measure(server: Server, tasks: Sequence[Task]) -> dict[str, Figures]:
    """Start the server once and do all `tasks`. Raises SystemFailure."""
    figures: dict[str, Figures] = {}
    with started(server, sum(task.seconds for task in tasks)) as (child, url, start_seconds):
        try:
            for task in tasks:
                if task.kind == "serve":
                    chats = _chats(url, task)
                    memory = resident_mb(child.process.pid)
                    figures[task.name] = {"start_seconds": start_seconds, "memory_mb": memory, **chats}
                else:
                    figures[task.name] = asyncio.run(_tokens(url, task))
        except* (httpx.HTTPError, OSError, ValueError) as group:
            raise child.failure(f"{group.exceptions[0]!r}") from None
    return figures


def measure_in_turn(servers: Mapping[str, Server], task: Task) -> Mapping[str, Figures]:
    """Start all `servers`, which stay alive together, and have one after the other serve each concurrency of a `serve`
    task: in their order, at every second concurrency in the reverse one. Raises SystemFailure."""
    figures: dict[str, dict[str, float]] = {name: {} for name in servers}
    order = list(servers)
    with contextlib.ExitStack() as stack:
        alive: dict[str, tuple[Child, str]] = {}
        for name, server in servers.items():
            child, url, figures[name]["start_seconds"] = stack.enter_context(started(server, task.seconds))
            alive[name] = child, url

        def ask(name: str, task: Task) -> Figures:
            child, url = alive[name]
            idle = [pid for other, (one, _) in alive.items() if other != name for pid in members(one.process.pid)]
            try:
                return _chats_and_cpu(url, task, child.process.pid, idle)
            except* (httpx.HTTPError, OSError, ValueError) as group:
                raise child.failure(f"{group.exceptions[0]!r}") from None

        for name in order:  # what a server imports or allocates at its first load is not counted
            ask(name, replace(task.trial(), waves=1))
        for streams in task.concurrency:
            for name in order:
                figures[name] |= ask(name, replace(task, concurrency=(streams,)))
            order.reverse()
        for name, (child, _) in alive.items():
            figures[name]["memory_mb"] = resident_mb(child.process.pid)
    return figures


@contextlib.contextmanager
def started(server: Server, seconds: float) -> Iterator[tuple[Child, str, float]]:
    """The running server, its address, and the seconds from its start to the first token that it streamed."""
    port = str(free_port())
    command = [str(word).replace("{port}", port) for word in server.command]
    url = f"http://127.0.0.1:{port}"
    begin = time.perf_counter()
    with running(
        command, log=server.log, seconds=seconds, environment=server.environment, folder=server.folder
    ) as child:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not _healthy(client):
                if child.process.poll() is not None:
                    raise child.failure(f"ended with status {child.process.returncode} before it was ready")
                time.sleep(POLL_SECONDS)
        asked = time.perf_counter()
        try:
            answer = asyncio.run(throughput.run(url, MODEL, 1, 1, 4, first_seed=1))
        except* (httpx.HTTPError, OSError, ValueError) as group:
            raise child.failure(f"{group.exceptions[0]!r}") from None
        yield child, url, asked - begin + answer.ttft_median


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def _chats(url: str, task: Task) -> Figures:
    figures: dict[str, float] = {}
    for streams in task.concurrency:
        requests, seed = num_requests(streams, task.waves), first_seed(task, streams)
        one = asyncio.run(throughput.run(url, MODEL, streams, requests, task.tokens, seed, task.spread))
        figures[f"tokens_per_second@{streams}"] = one.tokens_per_second
        figures[f"ttft@{streams}"] = one.ttft_median
        figures[f"tpot@{streams}"] = one.tpot_median
        figures[f"prompt_tokens@{streams}"] = one.prompt_tokens / one.requests
    return figures


def _chats_and_cpu(url: str, task: Task, asked: int, idle: Sequence[int]) -> Figures:
    """Of a `serve` task at one concurrency, beside the usual figures: CPU seconds by token of the process `asked`, not
    of those that it started, and how many CPUs the client and the processes `idle` kept busy."""
    (streams,) = task.concurrency

    def now() -> tuple[float, float, float, float]:
        return time.perf_counter(), cpu_seconds([asked]), time.process_time(), cpu_seconds(idle)

    begin = now()
    chats = _chats(url, task)
    seconds, *cpu = (after - before for before, after in zip(begin, now(), strict=True))
    return {
        **chats,
        f"cpu_seconds@{streams}": cpu[0] / (chats[f"tokens_per_second@{streams}"] * seconds),
        f"client_cpus@{streams}": cpu[1] / seconds,
        f"idle_cpus@{streams}": cpu[2] / seconds,
    }


async def _tokens(url: str, task: Task) -> Figures:
    """Prompts of random token ids through /v1/completions. A decode counts from the moment when the last stream had
    its first token, at the pace of that stream: before it, others still were at their prompts."""
    tokens = 1 if task.kind == "prefill" else task.tokens
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        prompts = (random_prompt(task, number) for number in range(task.streams))
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(_complete(client, prompt, tokens)) for prompt in prompts]
    if task.kind == "prefill":
        return {"tokens_per_second": task.prompt / streams[0].result()[0]}
    first, end = max(stream.result() for stream in streams)
    return {"tokens_per_second": task.streams * (tokens - 1) / (end - first)}


def random_prompt(task: Task, number: int) -> list[int]:
    """Token ids of the prompt of a stream, the same in every run; a prompt of no tokens is one of 16."""
    rng = random.Random(f"{task.name} {number}")
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(task.prompt or 16)]


async def _complete(client: httpx.AsyncClient, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds from the request to its first and to its last chunk. Raises httpx.HTTPError or ValueError."""
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first, end, produced = 0.0, 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now = time.perf_counter() - start
            chunk = json.loads(line[6:])
            if chunk["choices"]:
                first, end = first or now, now
            if usage := chunk.get("usage"):
                produced = usage["completion_tokens"]
    if produced != tokens:
        raise ValueError(f"expected {tokens} tokens, got {produced}")
    return first, end


def unknown(task: Task, system: str) -> SystemFailure:
    return SystemFailure(f"{system} has no way to measure {task.name}")
