"""Processes that end with the block that started them: with their children, in time, and with a log to show."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 20.0
POLL_SECONDS = 0.01
TAIL_LINES = 20


class SystemFailure(Exception):
    """A system could not be installed, started or measured. `log` is the end of what it wrote."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(slots=True)
class Child:
    """A running process and where it writes."""

    process: subprocess.Popen[str]
    log: Path
    seconds: float  # what it may take
    timed_out: bool = False

    def failure(self, message: str) -> SystemFailure:
        """The exception for what went wrong with it."""
        if self.timed_out:
            message = f"not done after {self.seconds:g} s"
        return SystemFailure(message, tail(self.log))

    def send(self, text: str) -> None:
        """Write a line to its input."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self.failure(f"takes no more input: {error}") from None

    def receive(self) -> str:
        """The next line of its output. Raises SystemFailure where it ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self.failure("ended before it answered")
        return line


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log; empty where there is none."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


@contextlib.contextmanager
def running(
    command: Sequence[object],
    *,
    log: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    piped: bool = False,
    folder: Path | None = None,
) -> Iterator[Child]:
    """Start `command`; at the end of the block, or after `seconds`, it and all it started are stopped.

    It has a session of its own, so that Ctrl-C reaches it through us and in order. What it writes goes to `log`; with
    `piped` only its errors do, and its input and output are the caller's. Raises SystemFailure where there is no such
    program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE if piped else None
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or file,
                stderr=file,
                text=True,
                cwd=folder,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        except OSError as error:
            raise SystemFailure(f"cannot start {command[0]}: {error}") from None
    child = Child(process, log, seconds)

    def expire() -> None:
        child.timed_out = True
        _signal(process, signal.SIGKILL)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield child
    finally:
        timer.cancel()
        _stop(process)


def output_of(
    command: Sequence[object],
    *,
    log: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Run a command to its end; what it printed. Raises SystemFailure where it fails or takes too long."""
    started = running(command, log=log, seconds=seconds, environment=environment, piped=True, folder=folder)
    with started as child:
        printed, _ = child.process.communicate()
        if child.process.returncode != 0 or child.timed_out:
            raise child.failure(f"{Path(str(command[0])).name} ended with status {child.process.returncode}")
    return printed


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def resident_mb(session: int, proc: Path = Path("/proc")) -> float:
    """Memory of all processes of a session in 10**6 bytes; pages that several of them share are counted once (PSS)."""
    total = 0
    for pid in members(session, proc):
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines = (proc / str(pid) / "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


def cpu_seconds(pids: Iterable[int], proc: Path = Path("/proc")) -> float:
    """CPU time that processes have used so far, without those that they started; of one that has ended, none."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it ended meanwhile
            # After the name in parentheses, user and system time are the 12th and 13th field.
            fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def members(session: int, proc: Path = Path("/proc")) -> Iterator[int]:
    """Processes of a session that run: those that have ended and wait for their parent do not."""
    for folder in proc.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                # The name in parentheses may hold spaces; what follows it is state, parent, group, session.
                state, _, _, its_session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(its_session) == session and state not in "ZX":
                    yield int(folder.name)


def _signal(process: subprocess.Popen[str], number: int) -> None:
    """To all processes of the session, also those that have made a group of their own."""
    for pid in members(process.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    # Also what a process that ended by itself left behind. Whoever comes next finds the machine without them.
    deadline = time.monotonic() + STOP_SECONDS
    while any(members(process.pid)) and time.monotonic() < deadline:
        _signal(process, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
