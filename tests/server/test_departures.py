"""Callers that leave, fall silent or read slowly, over a real core: what they leave behind is nothing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.weights import PackedModel, load_model
from tests.server.core_engine import CoreEngine
from tests.server.support import chat, listening, settings, wait_until
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.native("the books of our own core, step by step")

CHAT = "/v1/chat/completions"
CONTEXT = 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("home")
    write_tiny_llama(folder / "tiny.gguf", layers=1, context=CONTEXT)
    return load_model(str(folder / "tiny.gguf"), home=folder)


@pytest.fixture
async def engine(model: PackedModel) -> AsyncIterator[CoreEngine]:
    """At the end its books are in order, and all memory is free."""
    engine = CoreEngine(EngineCore(EngineConfig(model="tiny", threads=1, kv_cache_tokens=8192, max_num_seqs=16), model))
    yield engine
    assert engine.is_idle
    engine.core.check_integrity()
    stats = engine.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    engine.core.close()


def post(host: str, **fields: Any) -> bytes:
    """A request for an answer that nothing but its length ends."""
    # A token of this text side is a character, so everything is shown.
    body = json.dumps(chat("Hi there", ignore_eos=True, seed=1, **fields)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def leave(host: str, port: int, rng: random.Random) -> None:
    """Begin a stream, or a whole answer, and go at some moment, politely or not."""
    reader, writer = await asyncio.open_connection(host, port)
    stream = rng.random() < 0.8
    request = post(host, stream=stream, n=rng.choice([1, 1, 3]), max_tokens=1000)
    writer.write(request[: rng.choice([len(request), len(request), rng.randrange(len(request))])])
    for _ in range(rng.randrange(40)):
        await asyncio.sleep(0)
    if stream and rng.random() < 0.5:
        try:
            async with asyncio.timeout(0.2):
                for _ in range(rng.randrange(5)):
                    await reader.read(rng.randrange(1, 2000))
        except TimeoutError:
            pass
    if rng.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def test_two_hundred_callers_leave_and_fifty_fall_silent(engine: CoreEngine) -> None:
    rng = random.Random(7)
    configured = settings(max_num_seqs=16, max_num_batched_tokens=512, max_waiting=1000, body_timeout=1.0)
    async with listening(engine, configured, head_timeout=1.0) as url:
        host, port = url.removeprefix("http://").split(":")
        tasks = len(asyncio.all_tasks())
        whole = post(host)
        head_end = whole.index(b"\r\n\r\n") + 4
        silent = []
        for i in range(50):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(whole[: (0, 1, 40, head_end - 2, head_end, len(whole) - 1)[i % 6]])
            silent.append((reader, writer))
        for _ in range(10):
            await asyncio.gather(*(leave(host, int(port), rng) for _ in range(20)))
        async with asyncio.timeout(20):
            for reader, writer in silent:
                answer = await reader.read()  # to the end: the server closes
                assert not answer or b"408" in answer.partition(b"\r\n")[0]
                writer.close()
        await wait_until(lambda: engine.is_idle)
        engine.core.check_integrity()
        async with httpx.AsyncClient(base_url=url) as client:
            response = await client.post(CHAT, json=chat(max_tokens=3, ignore_eos=True))
            assert response.json()["usage"]["completion_tokens"] == 3
            assert 'seraph_sequences{model="m"} 0.0' in (await client.get("/metrics")).text
        await wait_until(lambda: len(asyncio.all_tasks()) <= tasks)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_departure_is_noticed_within_a_step_or_two(engine: CoreEngine, stream: bool) -> None:
    async with listening(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(post(host, stream=stream, max_tokens=1500))
        await wait_until(lambda: engine.core.stats().num_output_tokens > 20)
        writer.transport.abort()
        before = engine.core.stats().num_steps
        await wait_until(lambda: engine.is_idle)
        # In this test a step is a turn of the event loop; three of them carry the end of a connection to its reader.
        assert engine.core.stats().num_steps - before <= 5


async def test_the_first_token_does_not_wait_for_others(engine: CoreEngine) -> None:
    async with listening(engine) as url, httpx.AsyncClient(base_url=url) as client:
        body = chat(ignore_eos=True, max_tokens=1500, stream=True)
        async with client.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            num_tokens = engine.core.stats().num_output_tokens
            assert 0 < num_tokens < 50, num_tokens
        await wait_until(lambda: engine.is_idle)


async def test_a_slow_reader_costs_bounded_memory_and_loses_nothing(engine: CoreEngine) -> None:
    """What the connection does not take waits as text, in one piece for each choice, not as events."""
    async with listening(engine, send_buffer=8192) as url:
        host, port = url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.setblocking(False)
            await loop.sock_connect(peer, (host, int(port)))
            await loop.sock_sendall(peer, post(host, stream=True, max_tokens=1500))
            await wait_until(lambda: engine.core.stats().num_output_tokens > 0 and engine.is_idle)
            received = b""
            while b"data: [DONE]" not in received:
                received += await loop.sock_recv(peer, 65536)
        events = [line for line in received.decode().split("\n") if line.startswith("data: {")]
        texts = [json.loads(event[6:])["choices"][0]["delta"].get("content") or "" for event in events]
        assert len("".join(texts)) == 1500
        assert max(map(len, texts)) > 500, "what waited came as one"
