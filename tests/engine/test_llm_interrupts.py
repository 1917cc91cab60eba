"""Ctrl-C against a program that uses LLM: nothing is left running, locked or lying about."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.weights import load_model
from engine.weights.files import lock, try_lock
from engine.weights.source import parse
from engine.weights.store import lock_path
from tests.tiny_gguf import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import os, sys
from pathlib import Path
from engine import LLM, SamplingParams

source, home = sys.argv[1], Path(sys.argv[2])
ENDLESS = SamplingParams(ignore_eos=True)  # to the end of the context
SHORT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)

def say(text):
    print(text, flush=True)

def load():
    return LLM(source, home=home, kv_cache_tokens=4096, threads=2)

def survey(llm):
    stats = llm._core.stats()
    llm._core.check_integrity()
    children = Path("/proc/self/task").glob("*/children")
    say(f"live {len(llm._live)} running {stats.num_running} waiting {stats.num_waiting}")
    num_children = sum(len(child.read_text().split()) for child in children)
    say(f"blocks {stats.num_blocks - stats.num_free_blocks} children {num_children}")

def num_threads():
    return len(os.listdir("/proc/self/task"))
"""

SURVEYED = ["live 0 running 0 waiting 0", "blocks 0 children 0"]


class Program:
    """A running script. `lines` is what it printed after the line it was waited for."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait_for(self, expected: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == expected:
                return
        raise AssertionError(f"{expected!r} was not printed:\n{self.errors()}")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def rest(self) -> list[str]:
        """What it still prints, to its end."""
        assert self.process.stdout is not None
        lines = self.process.stdout.read().split("\n")
        self.process.wait(30)
        return lines[:-1]

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@contextmanager
def running(script: str, source: Path, home: Path) -> Iterator[Program]:
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(source), str(home)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Program(process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_tiny_llama(folder / "tiny.gguf")
    load_model(str(folder / "tiny.gguf"), home=folder).close()
    return folder


BATCH = """
    threads_before = num_threads()
    llm = load()
    expected = llm.generate("The sea", SHORT, progress=False)[0].token_ids
    step = llm._core.step
    def telling():
        deltas = step()
        if deltas:
            say("a step")
        return deltas
    llm._core.step = telling
"""


def test_in_the_middle_of_a_batch(home: Path) -> None:
    script = (
        BATCH
        + """
    try:
        llm.generate(["The sea"] * 500, ENDLESS)
        say("finished")
    except KeyboardInterrupt:
        llm._core.step = step
        say("interrupted")
    survey(llm)
    say(f"same {llm.generate('The sea', SHORT, progress=False)[0].token_ids == expected}")
    llm.close()
    llm.close()
    say(f"threads {num_threads() - threads_before}")
    """
    )
    with running(script, home / "tiny.gguf", home) as program:
        program.wait_for("a step")
        program.interrupt()
        program.wait_for("interrupted")
        said = program.rest()
        assert said[:3] == [*SURVEYED, "same True"], program.errors()
        assert said[3] == "threads 0", "the thread team is still there"
        assert program.process.returncode == 0


def test_in_the_middle_of_a_stream(home: Path) -> None:
    script = """
    llm = load()
    try:
        while True:
            for piece in llm.stream("The sea", ENDLESS):
                say("a piece")
    except KeyboardInterrupt:
        say("interrupted")
    survey(llm)
    """
    with running(script, home / "tiny.gguf", home) as program:
        program.wait_for("a piece")
        program.interrupt()
        program.wait_for("interrupted")
        assert program.rest() == SURVEYED, program.errors()
        assert program.process.returncode == 0


def test_not_caught_it_ends_the_program_as_an_interrupt_does(home: Path) -> None:
    script = (
        BATCH
        + """
    with llm:
        llm.generate(["The sea"] * 500, ENDLESS)
    """
    )
    with running(script, home / "tiny.gguf", home) as program:
        program.wait_for("a step")
        program.interrupt()
        program.rest()
        assert program.process.returncode == -signal.SIGINT  # 130 in a shell
        assert program.errors().rstrip().endswith("KeyboardInterrupt")


def test_while_it_waits_for_another_process_to_pack(home: Path) -> None:
    write_tiny_llama(home / "other.gguf", seed=1)
    source = str(home / "other.gguf")
    held = lock_path(parse(source), home)
    with lock(held, "test"), running("say('loading'); load()", Path(source), home) as program:
        program.wait_for("loading")
        wait_until_it_waits_for_a_lock(program.process.pid)
        program.interrupt()
        program.rest()
        assert program.process.returncode == -signal.SIGINT
    assert list((home / "packed").glob("other-*.seraph*")) == []


def test_while_it_packs(tmp_path: Path) -> None:
    """Packing takes a moment here: 11 million float weights become 4-bit ones."""
    source = tmp_path / "large.gguf"
    write_tiny_llama(source, hidden=512, layers=2, ffn=3072, quant="F32")
    script = "say('loading'); LLM(source, home=home, quantization='int4')"
    with running(script, source, tmp_path) as program:
        program.wait_for("loading")
        deadline = time.monotonic() + 30
        while not list((tmp_path / "packed").glob("*.tmp")):
            assert time.monotonic() < deadline and program.process.poll() is None, program.errors()
        program.interrupt()
        program.rest()
        assert program.process.returncode == -signal.SIGINT
    assert [path.suffix for path in (tmp_path / "packed").iterdir()] == [".lock"], "a file is left behind"
    with try_lock(lock_path(parse(str(source)), tmp_path), "test") as free:
        assert free
    load_model(str(source), home=tmp_path, quantization="int4").close()


def wait_until_it_waits_for_a_lock(pid: int) -> None:
    """A process that waits in flock(2) stands in /proc/locks behind an arrow."""
    deadline = time.monotonic() + 30
    while not any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines()):
        assert time.monotonic() < deadline
