"""What every system under measurement declares, and the room it is measured in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from loadtests.peers.plan import Task

Figures = Mapping[str, float]
"""Figures of a task by name: rates per second, times in seconds, memory in 10**6 bytes; "@N" is at concurrency N."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a system. `options` is for its own module."""

    label: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a system finds what it needs."""

    python: Path  # of its virtual environment
    gguf: Path  # the default model, as it is published
    models: Path  # what was made of it
    logs: Path
    threads: int

    @property
    def packages(self) -> Path:
        """The site-packages of the environment."""
        found = sorted(self.python.parents[1].glob("lib/python3*/site-packages"))
        return found[0] if found else self.python.parents[1] / "lib/site-packages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What pip installs for a system. Names and versions only: where packages come from is the machine's affair."""

    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()  # uninstalled again


class System(Protocol):
    """A system that can be measured."""

    name: str
    title: str  # with the version
    environments: Mapping[str, Environment]  # by name; the first is the one it runs in
    over_http: bool  # whether all of its tasks are measured in one session of its server

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        """Make its models from the default model, where they are not there yet. Raises SystemFailure."""

    def settings(self, family: str, place: Place) -> Sequence[Setting]:
        """The candidates for a family of tasks, of which the fastest is taken."""

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        """The figures of each task by its name. Raises SystemFailure."""
