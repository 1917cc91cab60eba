"""Parsers under fire: whatever bytes a checkpoint brings, a parser works or raises one of our errors.

Each `test_*.py` here takes one parser. Inputs come from valid ones that are damaged where it hurts: a count that claims
2**64 strings, a table spliced into another file, a template that doubles a string sixty times. `strategies.py` makes
them; it knows the formats well enough to damage one field and leave the rest in order, which is how code behind the
first check is reached.

For every example `fuzz` holds the parser to this:

* it returns, or raises a `SeraphError`; `ours` also checks that a FormatError names the file and, where the format is
  binary, the offset;
* it does so within `MAX_SECONDS`, counted in CPU time of the process, so that a busy machine changes nothing; a hang
  inside native code ends the whole run;
* it leaves no file open.

Memory is held to a stated multiple of the input by `peak_bytes` (what Python and numpy allocate, per example) and by
`limited` (a process of its own under RLIMIT_AS, for what allocates elsewhere).

How many: `make test` runs each property on a fixed number of fixed examples (the seed is the test's name, no database
of past failures is read or written), the same on every machine. `make test-full` runs `LONGER` times as many, new ones
every time; a failure prints the example that explains it. To run the long form of one file:

    python -m pytest -m full tests/fuzz/test_gguf.py
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from engine.errors import FormatError, SeraphError

LONGER = 50
MAX_SECONDS = 10.0
"""Of CPU time for one example. Honest ones take milliseconds; what this catches does not end at all."""
MAX_STUCK_SECONDS = 120.0
"""Of real time, after which native code that never returns to Python is taken to hang."""

Property = Callable[..., None]


def fuzz(examples: int, **strategies: SearchStrategy[Any]) -> Callable[[Property], Callable[..., None]]:
    """Make a test of a property `check(folder, **drawn)`; `folder` is an empty one, the same for all examples."""

    def decorate(check: Property) -> Callable[..., None]:
        @pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.full)])
        def test(length: str, tmp_path: Path) -> None:
            short = length == "short"

            # Explaining a failure takes many more runs of it; what fails in the short form can be run in the long one.
            @settings(
                max_examples=examples if short else examples * LONGER,
                phases=(Phase.generate, Phase.shrink),
                database=None,
                deadline=None,
                print_blob=True,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )
            @given(**strategies)
            def run(**drawn: Any) -> None:
                with watched():
                    check(tmp_path, **drawn)

            (seed(zlib.crc32(check.__name__.encode()))(run) if short else run)()

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate


@contextmanager
def watched(max_seconds: float = MAX_SECONDS) -> Iterator[None]:
    """Fail where the block takes longer than it may, or leaves a file open."""

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still running after {max_seconds} s of CPU time")

    before = _open_files()
    previous = signal.signal(signal.SIGPROF, late)
    faulthandler.dump_traceback_later(MAX_STUCK_SECONDS, exit=True)
    signal.setitimer(signal.ITIMER_PROF, max_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, previous)
    assert (leaked := _open_files() - before) == set(), f"left open: {leaked}"


@contextmanager
def ours(*, path: Path | None = None, offset: bool = False) -> Iterator[None]:
    """Let our own errors pass once their message was checked; every other exception goes on to fail the test.

    With `path`, a FormatError must name it; with `offset`, say where, unless the fault has no single place.
    """
    try:
        yield
    except FormatError as error:
        said = str(error)
        assert path is None or (error.path is not None and str(error.path) in said and path.name in said), said
        assert not offset or error.offset is None or f"at byte {error.offset}" in said, said
    except SeraphError as error:
        assert 0 < len(str(error)) < 2200, str(error)[:2200]


def peak_bytes(action: Callable[[], object]) -> int:
    """How much more memory Python and numpy held at the worst moment of `action` than before it."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def limited(script: str, given: object, *, megabytes: int, seconds: int = 120) -> list[str]:
    """The lines that `script` prints in a process that may hold `megabytes` more from its call of `limit()` on.

    `given` is there under that name, as it comes through JSON. Fails where the process dies, as one does that asks for
    more and cannot take the answer.
    """
    limit = """
    import json, resource, sys
    given = json.load(sys.stdin)
    def limit():
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (int(sys.argv[1]) << 20),) * 2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(limit) + textwrap.dedent(script), str(megabytes)],
        input=json.dumps(given),
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAYON_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout.splitlines()


def _open_files() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the listing's own
            continue
    return found
