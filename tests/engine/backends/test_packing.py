"""Fetching and packing in a process of its own: what it tells, how it fails, how it is given up."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec
import pytest

from engine.backends.packing import Lines, Work, pack_apart
from engine.config import EngineConfig
from engine.errors import EngineError, FormatError, SourceError
from engine.weights import load_model
from tests.tiny_gguf import write_tiny_llama


def config_of(folder: Path, name: str = "tiny.gguf") -> EngineConfig:
    return EngineConfig(model=str(folder / name), home=folder / "home")


def packed_files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "home" / "packed").glob("*") if path.suffix != ".lock")


async def test_a_model_is_packed_and_progress_told(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    config, told = config_of(tmp_path), list[Work]()
    await pack_apart(config, told.append)
    assert told[0] == Work("Packing tiny", 0, told[-1].total_bytes) and told[0].packing
    assert told[-1].done_bytes == told[-1].total_bytes
    (file,) = packed_files(tmp_path)
    assert file.endswith(".seraph")
    load_model(config.model, home=config.home).close()
    told.clear()
    await pack_apart(config, told.append)
    assert told == []  # it is there


async def test_what_keeps_it_from_that_is_raised_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.gguf does not exist"):
        await pack_apart(config_of(tmp_path, "none.gguf"), lambda work: None)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(FormatError, match=r"bad\.gguf"):
        await pack_apart(config_of(tmp_path, "bad.gguf"), lambda work: None)
    assert packed_files(tmp_path) == []


def scripted(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, sys, time\n{code}")


LINE = r"""os.write(1, b'{"type":"Work","label":"Fetching x","done_bytes":%d}\n' % os.getpid())"""


async def test_a_process_that_dies_is_an_error(tmp_path: Path) -> None:
    for code, status in (("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", -9)):
        with pytest.raises(EngineError, match=f"ended with status {status} and no word why"):
            await pack_apart(config_of(tmp_path), lambda work: None, command=scripted(code))


async def test_given_up_it_leaves_nothing(tmp_path: Path) -> None:
    packed = tmp_path / "home" / "packed"
    packed.mkdir(parents=True)
    half = packed / f"tiny-{'0' * 16}.seraph.1.tmp"
    code = f"open({str(half)!r}, 'w').close()\n{LINE}\ntime.sleep(60)"
    said: asyncio.Queue[Work] = asyncio.Queue()
    task = asyncio.create_task(pack_apart(config_of(tmp_path), said.put_nowait, command=scripted(code)))
    work = await asyncio.wait_for(said.get(), 20)
    pid = work.done_bytes
    assert not work.packing and half.exists()
    os.kill(pid, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not half.exists()


async def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """It is told whose child it is, and does nothing where that is gone already."""
    command = (sys.executable, "-P", "-m", "engine.backends.packing", "--config", "{}", "--parent", "1")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert (process.returncode, out) == (1, b"")


def test_lines_are_few() -> None:
    written: list[msgspec.Struct] = []
    now = [10.0]
    lines = Lines(written.append, clock=lambda: now[0])
    lines.start("Packing x", 1000)
    for _ in range(500):
        lines.advance(1)
    now[0] += 1.0
    lines.advance(1)
    for _ in range(499):
        lines.advance(1)
    lines.done()
    assert [work.done_bytes for work in written if isinstance(work, Work)] == [0, 501, 1000]
