"""Which CPUs are left by processes that bind their threads, as vLLM's do on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from engine.backends.vllm_cpus import USABLE, keep_to, stay_off

BOUND = """
import subprocess, sys
cpus = {int(cpu) for cpu in sys.argv[1].split(",")}
bind = f"import os, time; os.sched_setaffinity(0, {cpus}); print('bound', flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", bind])
"""


@pytest.fixture(autouse=True)
def all_usable() -> Iterator[None]:
    yield
    keep_to(USABLE)


def bound_to(*cpus: int) -> subprocess.Popen[str]:
    """A process with a child that is bound."""
    words = [sys.executable, "-c", BOUND, ",".join(map(str, cpus))]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "bound\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, 9)
    process.communicate()


def affinities() -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}


def test_every_thread_keeps_off_the_cpus_of_a_descendant() -> None:
    if len(USABLE) < 2:
        pytest.skip("one CPU: nothing would be left")
    first = min(USABLE)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    process = bound_to(first)
    try:
        assert stay_off(process.pid) == USABLE - {first}
        assert affinities() == {USABLE - {first}}
        keep_to(USABLE)
        assert affinities() == {USABLE}
    finally:
        end(process)
        done.set()
        thread.join()


def test_where_nothing_is_bound_or_would_be_left_all_stay_usable() -> None:
    process = bound_to(*USABLE)
    try:
        assert stay_off(process.pid) == USABLE
    finally:
        end(process)
    assert stay_off(process.pid) == USABLE, "it has ended"
    if len(USABLE) > 1:  # one is bound to each
        processes = [bound_to(cpu) for cpu in USABLE]
        try:
            assert stay_off(os.getpid()) == USABLE
        finally:
            for one in processes:
                end(one)
    assert affinities() == {USABLE}
