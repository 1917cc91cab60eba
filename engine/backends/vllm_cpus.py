"""Which CPUs this process keeps to beside vLLM on CPUs.

vLLM binds each thread that computes to a CPU of its own and leaves one CPU or more for the rest: its scheduler and the
server. The kernel knows nothing of that: it would put the server's thread on a CPU that computes as well, where a step
then waits for it, and with it all other threads of the step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Set
from pathlib import Path

PROC = Path("/proc")

USABLE = frozenset(os.sched_getaffinity(0))
"""The CPUs that this process had at first."""


def stay_off(pid: int) -> Set[int]:
    """Keep every thread of this process off the CPUs that threads of `pid` and its descendants are bound to.

    Returns the CPUs that it keeps to: USABLE where nothing is bound, as on GPUs, or nothing would be left.
    """
    bound: set[int] = set()
    for each in _family(pid):
        for thread in _threads(each):
            with contextlib.suppress(ProcessLookupError):
                cpus = os.sched_getaffinity(thread)
                if not cpus >= USABLE:
                    bound |= cpus
    left = USABLE - bound or USABLE
    keep_to(left)
    return left


def keep_to(cpus: Set[int]) -> None:
    """Bind every thread of this process. What begins later, processes too, follows the thread that starts it."""
    for thread in _threads(os.getpid()):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cpus)


def _family(pid: int) -> Iterator[int]:
    yield pid
    for file in (PROC / str(pid) / "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in file.read_text().split():
                yield from _family(int(child))


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(PROC / str(pid) / "task")]
    except OSError:
        return []
