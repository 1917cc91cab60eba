"""All sections of the report, side by side, and the report as a table or as JSON."""

from __future__ import annotations

import json
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future

from server.doctor import environment, kernels, machine, models
from server.doctor.finding import Finding, State, problem
from server.settings import version

SECONDS = 90.0
"""Time for a section; no section of a healthy machine needs more than a few seconds of it."""

DEEP_SECONDS = 24 * 3600.0
"""The same where all of the models' data is read."""

WIDTH = 110
MARKS = {State.OK: "ok", State.WARNING: "WARNING", State.PROBLEM: "PROBLEM"}

Section = Callable[[], Iterable[Finding]]


def sections(sources: Sequence[str] = (), *, deep: bool = False) -> dict[str, Section]:
    """The report's sections, by name. `sources`: the models to look at, or none for all in the cache."""
    return {
        "machine": machine.examine,
        "kernels": kernels.examine,
        "cache": models.examine_cache,
        "models": lambda: models.examine(sources, deep=deep),
        "environment": environment.examine,
    }


def examine(wanted: Mapping[str, Section], *, seconds: float = SECONDS) -> Iterator[tuple[str, list[Finding]]]:
    """The findings of each section, in order. They run side by side, and one that fails or hangs is a finding too."""
    running = {name: _start(name, section) for name, section in wanted.items()}
    for name, findings in running.items():
        try:
            yield name, findings.result(seconds)
        except TimeoutError:
            yield name, [problem(name, f"did not finish within {seconds:g} s", "Look for a disk that does not answer.")]
        except Exception as error:  # a report with a hole is better than none
            said = f"could not be examined: {type(error).__name__}: {error}"
            yield name, [problem(name, said, "Please report this.")]


def _start(name: str, section: Section) -> Future[list[Finding]]:
    """Run a section in a thread that does not keep the program from ending."""
    future: Future[list[Finding]] = Future()

    def run() -> None:
        try:
            future.set_result(list(section()))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=f"doctor-{name}", daemon=True).start()
    return future


def table(name: str, findings: Sequence[Finding]) -> str:
    """A section for the terminal."""
    width = max((len(one.subject) for one in findings), default=0)
    lines = [name]
    for one in findings:
        head = f"  {MARKS[one.state]:<8} {one.subject:<{width}}  "
        lines += _wrapped(one.detail, head)
        if one.advice:
            lines += _wrapped(f"-> {one.advice}", " " * len(head))
    return "\n".join(lines) + "\n"


def _wrapped(text: str, head: str) -> list[str]:
    return textwrap.wrap(
        text,
        max(WIDTH, len(head) + 40),
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(found: Mapping[str, Sequence[Finding]]) -> str:
    """The whole report for programs."""
    findings = [
        {"section": name, "subject": one.subject, "state": one.state.value, "detail": one.detail, "advice": one.advice}
        for name, section in found.items()
        for one in section
    ]
    states = [one["state"] for one in findings]
    counts = {state.value: states.count(state.value) for state in State}
    return json.dumps({"version": version(), "counts": counts, "findings": findings}, indent=2)


def run(wanted: Mapping[str, Section], *, json: bool, write: Callable[[str], None], deep: bool = False) -> int:
    """Write the report as it is found; returns the exit status: 1 where there is a problem, else 0."""
    found: dict[str, list[Finding]] = {}
    for name, findings in examine(wanted, seconds=DEEP_SECONDS if deep else SECONDS):
        found[name] = findings
        if not json:
            write(table(name, findings))
    states = [one.state for section in found.values() for one in section]
    problems, warnings = (states.count(state) for state in (State.PROBLEM, State.WARNING))
    write(as_json(found) if json else f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}")
    return 1 if problems else 0


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
