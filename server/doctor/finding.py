"""One line of the report."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"  # it works, less well than it could
    PROBLEM = "problem"  # something that Seraph needs, or was asked for, does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    subject: str
    state: State
    detail: str
    advice: str = ""


def ok(subject: str, detail: str) -> Finding:
    return Finding(subject, State.OK, detail)


def warning(subject: str, detail: str, advice: str) -> Finding:
    return Finding(subject, State.WARNING, detail, advice)


def problem(subject: str, detail: str, advice: str) -> Finding:
    return Finding(subject, State.PROBLEM, detail, advice)


def readable(nbytes: int) -> str:
    """Bytes for people: 377 MB, 2.1 GB."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.1f} GB"
