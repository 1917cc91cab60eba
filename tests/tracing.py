"""Stops, resumes and ends single threads of another process, as a debugger does, ptrace(2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONT, DETACH, SEIZE, INTERRUPT, GETREGS, SETREGS = 7, 17, 0x4206, 0x4207, 12, 13  # linux/ptrace.h
WALL = 0x40000000
FUTEX, EXIT = 202, 60  # of x86-64, as what follows
R_RAX, R_RDI, R_ORIG_RAX, R_RIP, NUM_REGISTERS = 10, 14, 15, 16, 27
WAIT_LIMIT = 30.0  # seconds; only reached by a failing test

_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_ptrace.restype = ctypes.c_long


def thread_named(pid: int, name: str) -> int:
    """The id of a process's thread. Waits until there is one of that name."""

    def find() -> int | None:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                if (task / "comm").read_text().strip() == name:
                    return int(task.name)
        return None

    return wait_for(find, f"a thread {name}")


def wait_for(look: Callable[[], int | None], what: str) -> int:
    """What `look` returns once that is not None."""
    end = time.monotonic() + WAIT_LIMIT
    while (found := look()) is None:
        assert time.monotonic() < end, f"there is no {what}"
        os.sched_yield()
    return found


def wait_until_asleep(pid: int, thread: int) -> None:
    """Until a thread waits in futex(2) for longer than it waits for the interpreter's lock."""

    def waits() -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/task/{thread}/syscall").read_text().startswith(f"{FUTEX} ")
        return False

    def look() -> int | None:
        for _ in range(5):
            if not waits():
                return None
            time.sleep(0.01)
        return 0

    wait_for(look, f"wait of thread {thread}")


class Stopped:
    """A thread that stands still. Use it in the thread that made it: ptrace knows no other."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        if _ptrace(SEIZE, thread, None, None) != 0:
            pytest.skip(f"ptrace is not allowed here: {os.strerror(ctypes.get_errno())}")
        self._do(INTERRUPT)
        os.waitpid(thread, WALL)

    def resume(self) -> None:
        self._do(DETACH)

    def end(self) -> None:
        """End the thread, which must be in a system call, by one to exit(2) in its place."""
        if platform.machine() != "x86_64":
            pytest.skip("the registers of another architecture")
        registers = (ctypes.c_ulong * NUM_REGISTERS)()
        self._do(GETREGS, registers)
        registers[R_ORIG_RAX] = 2**64 - 1  # or the interrupted call would be made again
        registers[R_RAX], registers[R_RDI], registers[R_RIP] = EXIT, 0, registers[R_RIP] - 2
        self._do(SETREGS, registers)
        self._do(CONT)
        os.waitpid(self.thread, WALL)

    def note_end(self) -> None:
        """Take note that it has ended, if it has: until then its process lasts."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.thread, WALL | os.WNOHANG)

    def _do(self, request: int, data: object = None) -> None:
        if _ptrace(request, self.thread, None, ctypes.cast(data, ctypes.c_void_p) if data is not None else None) != 0:  # type: ignore[arg-type]
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def stopped(pid: int, name: str) -> Iterator[Stopped]:
    """The thread of that name stands still, until the process ends or `resume` is called."""
    thread = Stopped(thread_named(pid, name))
    try:
        yield thread
    finally:
        with contextlib.suppress(OSError):
            thread.resume()
