from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import uvloop

from engine.backends.base import Engine
from engine.backends.child import Child
from engine.backends.native import Inflight, NativeEngine, Supervision, merge
from engine.config import EngineConfig
from engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    FormatError,
    RequestError,
)
from engine.request import EmbedRequest, FinishReason, Request, SamplingParams, TextInput, TokenDelta
from tests.conftest import ConfigureLogs
from tests.engine import scripted_core
from tests.engine.scripted_core import HANG, KILL, RAISE, expected_tokens

COMMAND = (sys.executable, "-P", scripted_core.__file__)
EXIT_LIMIT = 20.0  # seconds; only reached by a failing test


def scripted(model: str = "scripted", **kwargs: object) -> NativeEngine:
    supervision = Supervision(**{"backoff": 0.01, "max_backoff": 0.02, **kwargs})  # type: ignore[arg-type]
    return NativeEngine(
        EngineConfig(model=model), supervision=supervision, spawn=functools.partial(Child, command=COMMAND)
    )


def request(request_id: str, prompt: list[int], max_tokens: int | None = 8, output: list[int] | None = None) -> Request:
    return Request(
        request_id=request_id,
        model="scripted",
        prompt_token_ids=prompt,
        output_token_ids=output or [],
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=0,
    )


async def collect(engine: Engine, req: Request) -> list[int]:
    tokens: list[int] = []
    async for delta in engine.generate(req):
        assert delta.position == len(req.output_token_ids) + len(tokens)
        tokens += delta.token_ids
    return tokens


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(EXIT_LIMIT):
        while not await condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.005)


async def num_running(engine: Engine) -> int:
    return (await engine.stats()).num_running


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
async def engine() -> AsyncIterator[NativeEngine]:
    engine = scripted()
    await engine.start()
    yield engine
    await engine.stop(0.0)
    assert engine.pid is None and not engine.alive


# --- Requests ---


async def test_concurrent_requests_keep_their_tokens_apart(engine: NativeEngine) -> None:
    prompts = [[i, 7 * i] for i in range(1, 33)]
    answers = await asyncio.gather(*(collect(engine, request(f"r{p[0]}", p)) for p in prompts))
    assert answers == [expected_tokens(p, 8) for p in prompts]


async def test_the_last_delta_has_the_finish_reason(engine: NativeEngine) -> None:
    deltas = [delta async for delta in engine.generate(request("a", [1], max_tokens=5))]
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_a_resumed_request_continues_where_it_stopped(engine: NativeEngine) -> None:
    whole = expected_tokens([5], 8)
    assert await collect(engine, request("a", [5], output=whole[:3])) == whole[3:]


async def test_closing_the_iterator_aborts(engine: NativeEngine) -> None:
    stream = engine.generate(request("a", [1], max_tokens=None))
    await anext(stream)
    assert await num_running(engine) == 1
    await stream.aclose()
    await until(lambda: _is_idle(engine))


async def test_cancelling_the_reader_aborts(engine: NativeEngine) -> None:
    started = asyncio.Event()

    async def read() -> None:
        async for _ in engine.generate(request("a", [1], max_tokens=None)):
            started.set()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: _is_idle(engine))


async def _is_idle(engine: NativeEngine) -> bool:
    return await num_running(engine) == 0


async def test_an_aborted_id_can_be_used_again_and_sees_no_old_delta(engine: NativeEngine) -> None:
    for prompt in ([1], [2], [3]):
        stream = engine.generate(request("same", prompt, max_tokens=None))
        assert (await anext(stream)).token_ids[0] == prompt[0]
        await stream.aclose()
        await until(functools.partial(_can_reuse, engine, "same"))


async def _can_reuse(engine: NativeEngine, request_id: str) -> bool:
    try:
        return await collect(engine, request(request_id, [9], max_tokens=1)) == [9]
    except RequestError as error:
        assert "in use" in str(error)
        return False


async def test_a_live_id_is_refused_and_its_owner_undisturbed(engine: NativeEngine) -> None:
    stream = engine.generate(request("a", [1], max_tokens=200))
    first = await anext(stream)
    with pytest.raises(RequestError, match="'a' is in use"):
        await collect(engine, request("a", [2]))
    tokens = first.token_ids + [t async for delta in stream for t in delta.token_ids]
    assert tokens == expected_tokens([1], 200)


async def test_a_refused_request_raises_with_param_and_code(engine: NativeEngine) -> None:
    with pytest.raises(RequestError, match="The prompt is empty") as caught:
        await collect(engine, request("a", []))
    assert (caught.value.param, caught.value.code) == ("prompt", "empty_prompt")
    assert await collect(engine, request("a", [1])) == expected_tokens([1], 8)


@pytest.mark.parametrize("wrong", [2**64, "7"])
async def test_a_request_that_is_no_request_is_refused(engine: NativeEngine, wrong: object) -> None:
    with pytest.raises(RequestError):
        await collect(engine, request("a", [wrong]))  # type: ignore[list-item]
    assert await collect(engine, request("a", [1])) == expected_tokens([1], 8)


def texts(request_id: str, *inputs: list[int]) -> EmbedRequest:
    return EmbedRequest(request_id=request_id, model="scripted", inputs=[TextInput(ids) for ids in inputs])


async def test_texts_become_vectors_in_order_beside_what_is_generated(engine: NativeEngine) -> None:
    async def embed(i: int) -> None:
        vectors = await engine.embed(texts(f"t{i}", [i], [i, i + 1, i + 2]))
        assert vectors.tolist() == [[1, i], [3, 3 * i + 3]] and vectors.dtype == np.float32

    answers, *_ = await asyncio.gather(collect(engine, request("a", [3, 4])), *(embed(i) for i in range(16)))
    assert answers == expected_tokens([3, 4], 8)


async def test_cancelling_whoever_waits_for_vectors_aborts(engine: NativeEngine) -> None:
    task = asyncio.ensure_future(engine.embed(texts("t", *[[1]] * 100_000)))
    await until(lambda: _has_started(engine))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: _is_idle(engine))
    assert (await engine.embed(texts("u", [5]))).tolist() == [[1, 5]]


async def test_refused_texts_raise_with_param_and_code(engine: NativeEngine) -> None:
    with pytest.raises(RequestError, match="There are no texts") as caught:
        await engine.embed(texts("t"))
    assert (caught.value.param, caught.value.code) == ("input", "no_texts")


async def test_an_id_is_used_once_among_requests_of_both_kinds(engine: NativeEngine) -> None:
    stream = engine.generate(request("same", [1], max_tokens=None))
    await anext(stream)
    with pytest.raises(RequestError, match="is in use"):
        await engine.embed(texts("same", [5]))
    await stream.aclose()


async def test_a_killed_process_fails_the_texts_it_held(engine: NativeEngine) -> None:
    with pytest.raises(EngineDeadError, match="while it held the request"):
        await engine.embed(texts("t", [1], [KILL]))
    await until(lambda: _is_ready(engine))
    assert (await engine.embed(texts("t", [1]))).tolist() == [[1, 1]]


async def _is_ready(engine: NativeEngine) -> bool:
    return engine.ready


async def test_capabilities(engine: NativeEngine) -> None:
    assert (engine.capabilities().engine, engine.capabilities().vocab_size) == ("scripted", scripted_core.VOCAB_SIZE)
    with pytest.raises(EngineDeadError, match="has not been started"):
        scripted().capabilities()


async def test_a_busy_engine_reports_its_latest_stats() -> None:
    engine = scripted(stats_timeout=0.05, grace=0.1)
    await engine.start()
    before = await engine.stats()
    stream = engine.generate(request("a", [HANG], max_tokens=None))
    received = 0
    while received < scripted_core.AT_POSITION:
        received += len((await anext(stream)).token_ids)
    answers = await asyncio.gather(*(engine.stats() for _ in range(10)))
    assert all(answer.num_steps >= before.num_steps for answer in answers)
    await stream.aclose()
    await engine.stop(0.0)  # a hung process ignores SIGTERM, and is killed


# --- Death ---


async def test_a_killed_process_fails_what_it_held_and_is_replaced(engine: NativeEngine) -> None:
    pid = engine.pid
    assert pid is not None
    streams = [engine.generate(request(f"r{i}", [i], max_tokens=None)) for i in range(3)]
    for stream in streams:
        await anext(stream)
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            async for _ in stream:
                pass
    assert await collect(engine, request("r0", [5])) == expected_tokens([5], 8)  # waits for the new process
    assert engine.pid != pid and not exists(pid)
    assert (await engine.stats()).num_restarts == 1


async def test_a_request_interrupted_by_death_can_be_resumed(engine: NativeEngine) -> None:
    inflight = Inflight(request("a", [KILL, 4], max_tokens=10))
    with pytest.raises(EngineDeadError):
        async for delta in engine.generate(inflight.request):
            inflight.deliver(delta)
    assert 0 < len(inflight.received) <= scripted_core.AT_POSITION
    resumed = inflight.as_resumed_request()
    # The id that kills is taken out of the prompt, its sum kept.
    resumed = msgspec.structs.replace(resumed, prompt_token_ids=[KILL + 4])
    assert inflight.received + await collect(engine, resumed) == expected_tokens([KILL, 4], 10)


async def test_an_exception_in_a_step_ends_the_process_with_its_traceback(
    engine: NativeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EngineDeadError, match="exited with status 1"):
        await collect(engine, request("a", [RAISE]))
    assert await collect(engine, request("b", [1])) == expected_tokens([1], 8)
    assert "RuntimeError: the step failed" in capsys.readouterr().err


async def test_after_too_many_quick_deaths_it_gives_up() -> None:
    engine = scripted(max_quick_deaths=3)
    await engine.start()
    for i in range(3):
        assert engine.alive
        with pytest.raises(EngineDeadError):
            await collect(engine, request(f"r{i}", [KILL]))
    with pytest.raises(EngineDeadError, match="died too often"):
        await collect(engine, request("last", [1]))
    assert not engine.alive and not engine.ready
    assert (await engine.stats()).num_restarts == 2
    await engine.stop(0.0)


async def test_slow_deaths_do_not_count() -> None:
    engine = scripted(max_quick_deaths=2, quick_death=0.0)
    await engine.start()
    for i in range(4):
        with pytest.raises(EngineDeadError):
            await collect(engine, request(f"r{i}", [KILL]))
    assert await collect(engine, request("a", [1])) == expected_tokens([1], 8)
    await engine.stop(0.0)


async def test_a_request_waits_for_a_restart_only_so_long() -> None:
    children: list[Child] = []

    def spawn(config: EngineConfig) -> Child:
        model = config.model if not children else scripted_core.SLOW
        children.append(Child(EngineConfig(model=model), COMMAND))
        return children[-1]

    engine = NativeEngine(EngineConfig(model="a"), supervision=Supervision(restart_wait=0.05), spawn=spawn)
    await engine.start()
    with pytest.raises(EngineDeadError):
        await collect(engine, request("a", [KILL]))
    with pytest.raises(EngineOverloadedError, match="restarting"):
        await collect(engine, request("b", [1]))
    assert engine.alive and not engine.ready
    await engine.stop(1.0)  # while the new process is still loading
    assert not exists(children[-1].pid)


def test_the_delay_grows_and_is_bounded() -> None:
    supervision = Supervision(backoff=0.25, max_backoff=1.5)
    assert [supervision.delay(n) for n in range(7)] == [0, 0, 0.25, 0.5, 1.0, 1.5, 1.5]


# --- Start ---


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (scripted_core.BAD_CONFIG, ConfigError, "^threads must be fewer, got many.$"),
        (scripted_core.BAD_FILE, FormatError, "^model.gguf at byte 4: no magic$"),
        (scripted_core.BUG, EngineError, "^ZeroDivisionError: a bug$"),
        (scripted_core.CRASH, EngineError, r"(?s)was killed by SIGKILL .* before it was ready.*first\nlast words"),
    ],
)
async def test_what_keeps_it_from_starting_is_raised(model: str, error: type[Exception], message: str) -> None:
    engine = scripted(model)
    with pytest.raises(error, match=message):
        await engine.start()
    assert engine.pid is None and not engine.alive
    await engine.stop(0.0)


@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO])
async def test_it_logs_what_the_parent_logs(
    level: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(level, "seraph.engine"):
        engine = scripted()
        await engine.start()
    await engine.stop(0.0)
    assert (scripted_core.BUILT in capsys.readouterr().err) == (level == logging.DEBUG)


async def test_in_json_every_line_of_the_process_is_an_object(configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")
    engine = scripted("crash")
    with pytest.raises(EngineError, match="last words"):
        await engine.start()
    told = {line["message"]: line for line in map(json.loads, stream.getvalue().splitlines())}
    assert told["last words"]["logger"] == "seraph.engine"


async def test_the_process_logs_in_the_format_of_its_parent(
    configure_logs: ConfigureLogs, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("debug", "json")
    engine = scripted()
    await engine.start()
    await engine.stop(0.0)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert scripted_core.BUILT in [line["message"] for line in lines]


async def test_a_start_that_takes_too_long_is_ended() -> None:
    engine = scripted(scripted_core.SLOW, start_timeout=0.05)
    with pytest.raises(EngineError, match=r"not ready after 0\.05 s"):
        await engine.start()
    assert engine.pid is None


async def test_a_cancelled_start_leaves_no_process() -> None:
    engine = scripted(scripted_core.SLOW)
    engine.launch()
    pid = engine.pid
    assert pid is not None
    task = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not exists(pid)


def test_a_launch_without_a_start_can_be_undone() -> None:
    engine = scripted()
    engine.launch()
    pid = engine.pid
    assert pid is not None and exists(pid)
    engine.kill()
    assert engine.pid is None and not exists(pid)


# --- Stop ---


async def test_stop_drains_what_runs_and_admits_nothing() -> None:
    engine = scripted()
    await engine.start()
    running = asyncio.create_task(collect(engine, request("a", [1], max_tokens=100)))
    await until(functools.partial(_has_started, engine))
    stopping = asyncio.create_task(engine.stop(EXIT_LIMIT))
    await asyncio.sleep(0)
    assert engine.alive and not engine.ready
    with pytest.raises(EngineDeadError, match="is stopping"):
        await collect(engine, request("b", [1]))
    assert await running == expected_tokens([1], 100)
    await stopping
    assert not engine.alive


async def _has_started(engine: NativeEngine) -> bool:
    return await num_running(engine) == 1


async def test_stop_fails_what_does_not_finish_in_time() -> None:
    engine = scripted()
    await engine.start()
    stream = engine.generate(request("a", [1], max_tokens=None))
    await anext(stream)
    await engine.stop(0.01)
    with pytest.raises(EngineDeadError, match="was stopped"):
        async for _ in stream:
            pass
    await engine.stop(0.0)  # again: nothing to do


async def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fds = len(os.listdir("/proc/self/fd"))
    tasks = asyncio.all_tasks()
    for _ in range(2):
        engine = scripted()
        engine.launch()
        (folder,) = os.listdir(tmp_path)
        assert os.stat(tmp_path / folder).st_mode & 0o777 == 0o700
        await engine.start()
        assert not os.listdir(tmp_path)  # once connected, the name is not needed
        assert await collect(engine, request("a", [1])) == expected_tokens([1], 8)
        pid = engine.pid
        assert pid is not None
        await engine.stop(0.0)
        assert not exists(pid)
    assert asyncio.all_tasks() == tasks
    assert len(os.listdir("/proc/self/fd")) == fds
    assert not os.listdir(tmp_path)


async def test_a_temporary_folder_with_a_long_name_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    engine = scripted()
    await engine.start()
    assert await collect(engine, request("a", [1])) == expected_tokens([1], 8)
    await engine.stop(0.0)
    assert not os.listdir(deep)


async def test_a_program_that_is_not_there() -> None:
    engine = NativeEngine(EngineConfig(), spawn=functools.partial(Child, command=("/nonexistent/python",)))
    with pytest.raises(EngineError, match=r"could not be started: .*/nonexistent/python"):
        await engine.start()


def test_the_servers_event_loop_serves_it_too() -> None:
    async def serve_die_and_serve() -> None:
        engine = scripted()
        engine.launch()
        await engine.start()
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await collect(engine, request("a", [KILL]))
        assert await asyncio.gather(*(collect(engine, request(f"r{i}", [i])) for i in range(8))) == [
            expected_tokens([i], 8) for i in range(8)
        ]
        await engine.stop(1.0)

    uvloop.run(serve_die_and_serve())


# --- Without a process ---


def test_merging_keeps_what_the_last_delta_says() -> None:
    deltas = [
        TokenDelta(request_id="a", position=2, token_ids=[5], num_cached_tokens=32),
        TokenDelta(request_id="a", position=3, token_ids=[6, 7], num_cached_tokens=32),
        TokenDelta(request_id="a", position=5, finish_reason=FinishReason.ERROR, error="broken"),
    ]
    assert merge(deltas) == TokenDelta(
        request_id="a",
        position=2,
        token_ids=[5, 6, 7],
        finish_reason=FinishReason.ERROR,
        num_cached_tokens=32,
        error="broken",
    )


async def test_what_arrives_between_two_reads_comes_at_once() -> None:
    inflight = Inflight(request("a", [1], output=[9]))
    for position in (1, 2, 3):
        inflight.deliver(TokenDelta(request_id="a", position=position, token_ids=[position]))
    inflight.fail(EngineDeadError("gone"))
    assert await inflight.take() == TokenDelta(request_id="a", position=1, token_ids=[1, 2, 3])
    with pytest.raises(EngineDeadError, match="gone"):
        await inflight.take()
    assert inflight.as_resumed_request() == request("a", [1], output=[9, 1, 2, 3])


async def test_a_gap_fails_the_request_after_what_came_before_it() -> None:
    inflight = Inflight(request("a", [1]))
    inflight.deliver(TokenDelta(request_id="a", position=0, token_ids=[1]))
    inflight.deliver(TokenDelta(request_id="a", position=2, token_ids=[3]))
    assert (await inflight.take()).token_ids == [1]
    with pytest.raises(EngineError, match="expected position 1, got 2"):
        await inflight.take()
    assert not inflight.finished  # so that leaving it aborts what still runs
