"""A thread that stalls or dies is noticed, reported by name, and not waited for: real threads, stopped from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine.backends.native import NativeEngine
from engine.config import EngineConfig
from engine.errors import EngineDeadError
from engine.process import STALLED_STATUS
from engine.request import Request, SamplingParams
from engine.weights import load_encoder, load_model
from tests.tiny_encoders import ENCODERS, seed_of
from tests.tiny_gguf import write_tiny_llama
from tests.tracing import Stopped, stopped, thread_named, wait_until_asleep

ROOT = Path(__file__).resolve().parents[2]
STALL_TIMEOUT = 1.0
EXIT_LIMIT = 30.0  # seconds; only reached by a failing test

SCRIPT = """
import sys
from pathlib import Path
from engine import LLM, SamplingParams
from engine.errors import EngineError, StalledRankError

SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

def say(*words):
    print(*words, flush=True)

def attempt(what):
    sys.stdin.readline()
    try:
        what()
    except StalledRankError as error:
        say(error.rank, error.thread, error.phase, "|", error)
    except EngineError as error:
        say("another error", error)
    else:
        say("done")

source = Path(sys.argv[1])
beside = {} if source.is_dir() else {"tensor_parallel_size": 2, "embedding_model": str(source.parent / "minilm")}
llm = LLM(sys.argv[1], home=Path(sys.argv[2]), kv_cache_tokens=1024, threads=3, stall_timeout=float(sys.argv[3]),
          progress=False, **beside)
generate = lambda: llm.generate([[5, 6, 7]], SHORT, progress=False)
embed = lambda: llm.embed(["the river", "bread", "water"] * 20, progress=False)
if beside:
    generate()
embed()
say("ready")
for name in sys.argv[4:]:
    attempt({"generate": generate, "embed": embed, "close": llm.close}[name])
say("the end")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_llama(path)
    load_model(str(path), home=path.parent).close()
    encoder = ENCODERS["minilm"].write(path.parent / "minilm", seed_of("minilm"))
    load_encoder(str(encoder), home=path.parent).close()
    return path


@contextlib.contextmanager
def script(source: Path, *calls: str) -> Iterator[subprocess.Popen[str]]:
    """A program that uses LLM with two ranks of one and two threads, and makes each call when told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(source.parent), str(STALL_TIMEOUT), *calls],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert heard(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> str:
    """Have the program make its next call; returns what it says of it."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return heard(process)


def test_a_stalled_thread_is_named_and_nobody_waits_for_it(source: Path) -> None:
    with (
        script(source, "generate", "generate", "close", "close") as process,
        stopped(process.pid, "seraph-r1t0"),
        stopped(process.pid, "seraph-r1t1"),
    ):
        said = tell(process)
        assert said.startswith("1 0 phase ")
        assert "thread 0 of tensor-parallel rank 1 has made no progress for 1 s: phase " in said
        assert tell(process) == said, "no further step can be computed"
        assert tell(process) == tell(process) == "done", "what closes it frees nothing, and says nothing again"
        assert heard(process) == "the end"


def test_an_encoder_beside_a_decoder_with_stalled_threads_goes_on_until_a_step_needs_them(source: Path) -> None:
    """Nothing of an encoder is a rank's own: the others take what a stalled thread has not begun."""
    with (
        script(source, "embed", "generate", "embed", "close") as process,
        stopped(process.pid, "seraph-r1t0"),
        stopped(process.pid, "seraph-r1t1"),
    ):
        assert tell(process) == "done"
        said = tell(process)
        assert said.startswith("1 0 phase ") and "thread 0 of tensor-parallel rank 1 has made no progress" in said
        assert "thread 0 of tensor-parallel rank 1 has made no progress" in tell(process), "its team is broken"
        assert tell(process) == "done"
        assert heard(process) == "the end"


def test_a_thread_of_an_encoder_alone_that_does_not_end_is_named(source: Path) -> None:
    with (
        script(source.parent / "minilm", "embed", "close", "close") as process,
        stopped(process.pid, "seraph-r0t1"),
    ):
        assert tell(process) == "done", "the others take what it would have done"
        assert tell(process).startswith("0 1 the end | thread 1 of tensor-parallel rank 0 has made no progress")
        assert tell(process) == "done"
        assert heard(process) == "the end"


def test_of_a_rank_with_another_thread_one_may_stall_before_a_step(source: Path) -> None:
    """It holds nothing that others could not take."""
    with script(source, "generate", "close") as process, stopped(process.pid, "seraph-r1t1") as thread:
        assert tell(process) == "done"
        thread.resume()
        assert tell(process) == "done"
        assert heard(process) == "the end"
        assert process.wait(EXIT_LIMIT) == 0


def test_a_thread_that_does_not_end_is_named(source: Path) -> None:
    with script(source, "close") as process, stopped(process.pid, "seraph-r1t1"):
        said = tell(process)
        assert said.startswith("1 1 the end | thread 1 of tensor-parallel rank 1 has made no progress for 1 s")
        assert heard(process) == "the end"


def test_a_thread_that_has_died_is_named(source: Path) -> None:
    with script(source, "generate", "generate", "close") as process:
        for name in ("seraph-r1t0", "seraph-r1t1"):
            thread = thread_named(process.pid, name)
            wait_until_asleep(process.pid, thread)
            Stopped(thread).end()
        said = tell(process)
        assert said.startswith("1 0 phase ") and "thread 0 of tensor-parallel rank 1 has died" in said
        assert tell(process) == said
        assert tell(process) == "done"
        assert heard(process) == "the end"
        assert process.wait(EXIT_LIMIT) == 0


def test_a_stalled_thread_that_goes_on_after_all_finds_what_it_held(source: Path) -> None:
    with script(source, "generate", "close") as process:
        with stopped(process.pid, "seraph-r1t0") as first, stopped(process.pid, "seraph-r1t1") as second:
            assert tell(process).startswith("1 0 ")
            first.resume()
            second.resume()
        assert tell(process) == "done"
        assert heard(process) == "the end"
        assert process.wait(EXIT_LIMIT) == 0


def test_a_process_that_is_stopped_as_a_whole_has_no_stalled_thread(source: Path) -> None:
    with script(source, "generate") as process:
        with stopped(process.pid, "seraph-r1t0") as thread, stopped(process.pid, "seraph-r1t1") as other:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            wait_until_asleep(process.pid, process.pid)  # in the middle of a step
            process.send_signal(signal.SIGSTOP)
            thread.resume()  # into the same stop as all the others
            other.resume()
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        stopped_at = time.monotonic()
        while time.monotonic() < stopped_at + 2 * STALL_TIMEOUT:
            os.sched_yield()
        process.send_signal(signal.SIGCONT)
        assert heard(process) == "done"


# In a process of its own


@pytest.fixture
def config(source: Path) -> EngineConfig:
    return EngineConfig(
        model=str(source),
        home=source.parent,
        tensor_parallel_size=2,
        threads=2,
        stall_timeout=STALL_TIMEOUT,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        kv_cache_tokens=1024,
    )


REQUEST = Request(
    request_id="a",
    model="tiny",
    prompt_token_ids=[5, 6, 7],
    sampling=SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True),
    seed=1,
)


async def test_an_engine_process_with_a_stalled_rank_says_so_and_is_replaced(config: EngineConfig) -> None:
    short = msgspec.structs.replace(REQUEST, sampling=SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    engine = NativeEngine(config)
    await engine.start()
    assert engine.capabilities().num_ranks == 2
    expected = [token async for delta in engine.generate(short) for token in delta.token_ids]
    pid = engine.pid
    assert pid is not None
    thread = Stopped(thread_named(pid, "seraph-r1t0"))
    with pytest.raises(EngineDeadError, match=rf"exited with status {STALLED_STATUS} \(thread 0 of .* rank 1 has made"):
        await collect(engine, thread, REQUEST)
    assert await collect(engine, None, short) == expected
    assert engine.pid != pid
    await engine.stop(0.0)


async def test_an_engine_process_whose_caller_stalls_ends_too(
    config: EngineConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = NativeEngine(config)
    await engine.start()
    pid = engine.pid
    assert pid is not None
    rank1 = Stopped(thread_named(pid, "seraph-r1t0"))
    task = asyncio.get_running_loop().create_task(collect(engine, None, REQUEST))
    await asyncio.to_thread(wait_until_asleep, pid, pid)  # the caller, for rank 1, in the middle of a step
    Stopped(pid)
    rank1.resume()
    with pytest.raises(EngineDeadError, match=rf"exited with status {STALLED_STATUS} \(a thread has stalled\)"):
        # The caller is the process's first thread, whose end the engine notes; here it would take its exit status away.
        await asyncio.wait_for(task, EXIT_LIMIT)
    assert "thread 0 of tensor-parallel rank 0 has made no progress for 1 s" in capfd.readouterr().err
    await engine.stop(0.0)


async def collect(engine: NativeEngine, traced: Stopped | None, request: Request) -> list[int]:
    """The tokens of a request."""

    async def tokens() -> list[int]:
        return [token async for delta in engine.generate(request) for token in delta.token_ids]

    if traced is None:
        return await tokens()
    return await ended(asyncio.get_running_loop().create_task(tokens()), traced)


async def ended(task: asyncio.Task[list[int]], traced: Stopped) -> list[int]:
    """What becomes of a task. A traced thread's end must be noted here, or its process would not end."""
    async with asyncio.timeout(EXIT_LIMIT):
        while not task.done():
            traced.note_end()
            await asyncio.sleep(0.005)
    return await task
