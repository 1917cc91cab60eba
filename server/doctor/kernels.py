"""The kernels: which builds there are, which one is taken, and whether each computes what its twin does.

Nothing here imports a build: one that is damaged may end the process that does.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from engine.config import child_environment, requested_isa
from engine.errors import ConfigError
from engine.kernels import select_isa
from engine.kernels.selftest import BuildState, Check
from server.doctor.finding import Finding, ok, problem, warning

T = TypeVar("T")

COMMAND = (sys.executable, "-P", "-m", "engine.kernels.selftest")
"""-P: what lies in the current folder must not be taken for our packages."""

SECONDS = 60.0
"""Time for one build's self-test, which takes half a second of an idle core."""

REINSTALL = "Install Seraph again; in a checkout, `make build` compiles the kernels."
AVOID = "Until it is mended, serve with --isa {others} (or SERAPH_ISA). Please report this with the output of --json."


class SelfTestError(Exception):
    """A self-test ended without an answer; the message says how."""


def examine(command: Sequence[str] = COMMAND, *, seconds: float = SECONDS) -> Iterator[Finding]:
    """Findings about the kernels. `command`, which is given nothing or the name of a build, stands in for the tests."""
    try:
        builds = _ask(command, (), list[BuildState], seconds)
    except SelfTestError as error:
        yield problem("builds", f"the portable kernels {error}", REINSTALL)
        return
    usable = [build.isa for build in builds if build.installed and build.executable]
    with ThreadPoolExecutor(max_workers=2) as pool:
        tests = {isa: pool.submit(_ask, command, (isa,), list[Check], seconds) for isa in usable}
        yield from (_build(build) for build in builds)
        yield _choice(usable)
        for isa, test in tests.items():
            others = ", ".join(other for other in usable if other != isa) or "reference"
            try:
                checks = test.result()
            except SelfTestError as error:
                yield problem(f"self-test {isa}", str(error), AVOID.format(others=others))
            else:
                yield _verdict(isa, checks, others)


def _build(build: BuildState) -> Finding:
    subject = f"build {build.isa}"
    if not build.installed:
        return (
            warning(subject, "not installed, and this CPU could run it", REINSTALL)
            if build.executable
            else ok(subject, "not installed; this CPU could not run it")
        )
    return ok(subject, "installed" if build.executable else "installed; this CPU lacks its instructions")


def _choice(usable: Sequence[str]) -> Finding:
    """Which build is taken, and why."""
    try:
        asked = requested_isa()
        chosen = select_isa(asked, available=usable)
    except ConfigError as error:
        return problem("choice", str(error), "Unset SERAPH_ISA, or set it to a build that this machine can run.")
    if asked == "auto":
        return ok("choice", f"{chosen}, the best that is installed and that this CPU can run")
    if chosen == "reference":
        return warning("choice", "reference, by SERAPH_ISA: numpy, hundreds of times slower", "Unset SERAPH_ISA.")
    if chosen != usable[0]:
        return warning("choice", f"{chosen}, by SERAPH_ISA; {usable[0]} is faster", "Unset SERAPH_ISA.")
    return ok("choice", f"{chosen}, by SERAPH_ISA")


def _verdict(isa: str, checks: Sequence[Check], others: str) -> Finding:
    failed = [f"{check.name}: {check.error}" for check in checks if check.error]
    if not checks:
        failed = ["it checked nothing"]
    if failed:
        return problem(f"self-test {isa}", "; ".join(failed), AVOID.format(others=others))
    how = "to the last bit" if isa != "portable" else "within rounding"
    return ok(f"self-test {isa}", f"{len(checks)} checks agree with the twin {how}")


def _ask(command: Sequence[str], arguments: Sequence[str], kind: type[T], seconds: float) -> T:
    """The JSON answer of a self-test's process. Raises SelfTestError where it crashes, hangs or says something else."""
    try:
        # The child finds the packages that we found, however this program was started.
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=child_environment(PYTHONPATH=":".join(filter(None, sys.path))),
        )
    except subprocess.TimeoutExpired:
        raise SelfTestError(f"did not answer within {seconds:g} s") from None
    except OSError as error:
        raise SelfTestError(f"could not be run: {error}") from None
    if done.returncode:
        raise SelfTestError(_ending(done))
    try:
        return msgspec.json.decode(done.stdout, type=kind)
    except msgspec.MsgspecError as error:
        raise SelfTestError(f"gave no answer: {error}") from None


def _ending(done: subprocess.CompletedProcess[Any]) -> str:
    """How a process failed: its signal, or its status and last line."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = {"SIGILL": "an instruction that this CPU lacks", "SIGSEGV": "a memory error"}.get(name)
        return f"crashed with {name}" + (f": {hint}" if hint else "")
    said = done.stderr.decode(errors="replace").strip().splitlines()
    return f"failed with status {done.returncode}" + (f": {said[-1]}" if said else "")
