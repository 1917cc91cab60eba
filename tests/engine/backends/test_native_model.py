"""NativeEngine over the real core and a tiny checkpoint: what crosses the process boundary changes no token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import msgspec
import pytest

from engine.backends.native import Inflight, NativeEngine
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ConfigError, EngineDeadError, FormatError, ModelError, RequestError, SourceError
from engine.request import EngineStats, Request, SamplingParams
from engine.weights import load_model
from tests.tiny_gguf import write_tiny_llama

EXIT_LIMIT = 20.0  # seconds; only reached by a failing test


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_llama(folder / "tiny.gguf")
    return EngineConfig(
        model=str(folder / "tiny.gguf"),
        home=folder / "home",
        isa="reference",
        threads=1,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_tokens=1024,
    )


def request(config: EngineConfig, request_id: str, *, temperature: float = 0.0, max_tokens: int = 24) -> Request:
    return Request(
        request_id=request_id,
        model=Path(config.model).stem,
        prompt_token_ids=[3 + (7 * i + len(request_id)) % 300 for i in range(40)],
        sampling=SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True),
        seed=11,
    )


def in_process(config: EngineConfig, req: Request) -> list[int]:
    """The tokens of a request alone in a core without a process around it."""
    model = load_model(config.model, home=config.home)
    core = EngineCore(config, model)
    core.add(req)
    tokens: list[int] = []
    while core.has_work:
        tokens += [token for delta in core.step() for token in delta.token_ids]
    core.close()
    model.close()
    return tokens


async def collect(engine: NativeEngine, req: Request) -> list[int]:
    return [token async for delta in engine.generate(req) for token in delta.token_ids]


async def stats_when_idle(engine: NativeEngine) -> EngineStats:
    async with asyncio.timeout(EXIT_LIMIT):
        while (stats := await engine.stats()).num_running:  # noqa: ASYNC110 - another process makes it so
            await asyncio.sleep(0.005)
    return stats


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_tokens_are_those_of_the_core_alone(config: EngineConfig, temperature: float) -> None:
    requests = [request(config, "x" * n, temperature=temperature) for n in (1, 2, 3)]
    engine = NativeEngine(config)
    engine.launch()
    expected = [in_process(config, req) for req in requests]
    await engine.start()
    assert await asyncio.gather(*(collect(engine, req) for req in requests)) == expected
    capabilities = engine.capabilities()
    assert (capabilities.engine, capabilities.model, capabilities.max_model_len) == ("native", "tiny", 512)
    await engine.stop(0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_killed_request_resumed_on_a_fresh_engine_continues(config: EngineConfig, temperature: float) -> None:
    whole = request(config, "a", temperature=temperature, max_tokens=48)
    engine = NativeEngine(config)
    await engine.start()
    inflight, pid = Inflight(whole), engine.pid
    assert pid is not None
    with pytest.raises(EngineDeadError):
        async for delta in engine.generate(whole):
            inflight.deliver(delta)
            if len(inflight.received) >= 5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert 5 <= len(inflight.received) < 48
    assert inflight.received + await collect(engine, inflight.as_resumed_request()) == in_process(config, whole)
    await engine.stop(0.0)


async def test_an_abort_frees_every_block(config: EngineConfig) -> None:
    engine = NativeEngine(config)
    await engine.start()
    streams = [engine.generate(request(config, "x" * n, max_tokens=400)) for n in (1, 2)]
    await asyncio.gather(*(anext(stream) for stream in streams))
    assert (await engine.stats()).num_running == 2
    for stream in streams:
        await stream.aclose()
    stats = await stats_when_idle(engine)
    assert stats.num_free_blocks == stats.num_blocks == 32
    await engine.stop(0.0)


async def test_what_the_core_refuses_is_raised_with_its_code(config: EngineConfig) -> None:
    engine = NativeEngine(config)
    await engine.start()
    good = request(config, "a")
    for wrong, code in (
        ({"model": "other"}, "model_not_found"),
        ({"prompt_token_ids": [1] * 512}, "context_length_exceeded"),
        ({"prompt_token_ids": [307]}, None),
    ):
        with pytest.raises(RequestError) as caught:
            await collect(engine, msgspec.structs.replace(good, **wrong))
        assert caught.value.code == code and caught.value.param is not None
    assert await collect(engine, good) == in_process(config, good)
    await engine.stop(0.0)


@pytest.fixture
def truncated(config: EngineConfig, tmp_path: Path) -> Path:
    path = tmp_path / "truncated.gguf"
    path.write_bytes(Path(config.model).read_bytes()[:500])
    return path


async def test_what_keeps_it_from_starting(config: EngineConfig, truncated: Path, tmp_path: Path) -> None:
    cases: list[tuple[EngineConfig, type[Exception], str]] = [
        (EngineConfig(model=str(truncated), home=tmp_path), FormatError, "truncated.gguf"),
        (EngineConfig(model=str(tmp_path / "none.gguf"), home=tmp_path), SourceError, "none.gguf"),
        (
            EngineConfig(model=config.model, home=config.home, isa="reference", max_model_len=100_000),
            ConfigError,
            "max_model_len",
        ),
    ]
    for wrong, error, message in cases:
        engine = NativeEngine(wrong)
        with pytest.raises((ModelError, ConfigError), match=message) as caught:
            await engine.start()
        assert type(caught.value) is error
