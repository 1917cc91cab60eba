from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from loadtests.peers.processes import (
    SystemFailure,
    cpu_seconds,
    free_port,
    members,
    output_of,
    resident_mb,
    running,
    tail,
)

FOREVER = "import threading; threading.Event().wait()"
# A child that ignores SIGTERM, and a grandchild; both say that they live.
STUBBORN = f"""
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", {FOREVER!r}])
print(child.pid, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
{FOREVER}
"""


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_it_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, sys; print(os.environ['PEER']); print('noise', file=sys.stderr)"]
    assert output_of(command, log=tmp_path / "logs" / "x", seconds=60, environment={"PEER": "a"}) == "a\n"
    assert tail(tmp_path / "logs" / "x") == "noise"


def test_a_failure_shows_the_end_of_its_log(tmp_path: Path) -> None:
    lines = "import sys; print(*range(100), sep='\\n', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SystemFailure, match="status 3") as caught:
        output_of([sys.executable, "-c", lines], log=tmp_path / "log", seconds=60)
    assert caught.value.log.split() == [str(n) for n in range(80, 100)]


def test_a_program_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="cannot start"):
        output_of([tmp_path / "missing"], log=tmp_path / "log", seconds=60)


def test_it_is_stopped_when_its_time_is_over(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match=r"not done after 0\.2 s"):
        output_of([sys.executable, "-c", FOREVER], log=tmp_path / "log", seconds=0.2)


def test_nothing_outlives_the_block(tmp_path: Path) -> None:
    pids: list[int] = []
    with (
        pytest.raises(KeyboardInterrupt),
        running([sys.executable, "-c", STUBBORN], log=tmp_path / "log", seconds=60, piped=True) as child,
    ):
        pids += [child.process.pid, int(child.receive())]
        assert all(map(lives, pids))
        assert resident_mb(child.process.pid) > 2  # two interpreters
        raise KeyboardInterrupt
    assert not any(map(lives, pids))


def test_a_process_that_dies_while_it_is_asked(tmp_path: Path) -> None:
    dies = "import sys; sys.stdin.readline(); sys.exit('out of memory')"
    with running([sys.executable, "-c", dies], log=tmp_path / "log", seconds=60, piped=True) as child:
        child.send("a task")
        with pytest.raises(SystemFailure, match="ended before it answered") as caught:
            child.receive()
    assert caught.value.log == "out of memory"


def test_memory_counts_a_session_and_nothing_else(tmp_path: Path) -> None:
    for pid, session, kib in ((7, 7, 1000), (8, 7, 500), (9, 9, 4000)):
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} (a (b) c) S 1 {pid} {session} 0 -1")
        (folder / "smaps_rollup").write_text(
            f"00-ff ---p 0 00:00 0 [rollup]\nRss: 9999 kB\nPss:   {kib} kB\nPss_Anon: 1 kB\n"
        )
    (tmp_path / "self").mkdir()
    assert resident_mb(7, tmp_path) == pytest.approx(1500 * 1024 / 1e6)


def test_cpu_time_is_that_of_the_processes_alone(tmp_path: Path) -> None:
    for pid, user, system in ((7, 300, 50), (8, 40, 10)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(
            f"{pid} (a (b) c) S 1 {pid} 7 0 -1 4194304 1 2 3 4 {user} {system} 999 999 20 0"
        )
    ticks = os.sysconf("SC_CLK_TCK")
    assert cpu_seconds([7], tmp_path) == 350 / ticks
    assert cpu_seconds(members(7, tmp_path), tmp_path) == 400 / ticks
    assert cpu_seconds([9], tmp_path) == 0


def test_a_free_port() -> None:
    assert 1024 <= free_port() < 65536
