"""What was measured, as JSON lines that are appended as they come: a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1


class RecordsError(Exception):
    """A file of results cannot be read, or is of another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What all of a run has in common. A run goes on only with the same plan on the same machine."""

    machine: Mapping[str, str]
    plan: Mapping[str, Any]
    versions: Mapping[str, str]  # titles of the systems by name
    format: int = FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The setting of a system for a family of tasks, and what each candidate reached."""

    pair: str
    system: str
    family: str
    chosen: str
    trials: Mapping[str, float]  # label -> tokens per second; 0 for one that failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One task of one turn."""

    round: int
    pair: str
    system: str
    task: str
    setting: str
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A turn, or a whole system, that could not be measured."""

    pair: str
    system: str
    what: str
    message: str
    log: str


Record = Header | Choice | Measurement | Failure
_KINDS: Mapping[str, type[Record]] = {
    "header": Header,
    "choice": Choice,
    "measurement": Measurement,
    "failure": Failure,
}


@dataclass(slots=True)
class Results:
    """All records of a file."""

    header: Header
    choices: list[Choice] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, record: Record) -> None:
        match record:
            case Choice():
                self.choices.append(record)
            case Measurement():
                self.measurements.append(record)
            case Failure():
                self.failures.append(record)
            case Header():
                raise RecordsError("a second header")

    def choice(self, pair: str | None, system: str, family: str) -> Choice | None:
        """What was found in one comparison, or in any."""
        found = (c for c in self.choices if (c.system, c.family) == (system, family) and pair in (None, c.pair))
        return next(found, None)

    def has(self, round: int, pair: str, system: str, task: str) -> bool:
        """Whether that task of that turn is measured."""
        wanted = (round, pair, system, task)
        return any((m.round, m.pair, m.system, m.task) == wanted for m in self.measurements)


def write(path: Path, record: Record) -> None:
    """Append a record; it is on the disk when this returns."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(record, cls))
    with path.open("a") as file:
        file.write(json.dumps({"kind": kind, **asdict(record)}, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Results:
    """The results in a file. A last line without its end, which a killed run leaves, is left out and cut off.

    Raises RecordsError with the line's number for anything else that `write` did not write.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"cannot read {path}: {error}") from None
    whole = text[: text.rfind("\n") + 1]
    results: Results | None = None
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            record = _KINDS[values.pop("kind")](**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordsError(f"{path}:{number}: no record: {error!r}") from None
        if results is not None:
            results.add(record)
        elif isinstance(record, Header) and record.format == FORMAT:
            results = Results(record)
        else:
            raise RecordsError(f"{path}:{number}: expected a header of format {FORMAT}")
    if results is None:
        raise RecordsError(f"{path} holds no results")
    return results


def resume(path: Path, header: Header) -> Results:
    """The results so far of a run with this header: those in the file, or none, and then the file is begun.

    Raises RecordsError where the file is of another plan, another machine or other versions.
    """
    if not path.exists() or "\n" not in path.read_text():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        write(path, header)
        return Results(header)
    results = read(path)
    text = path.read_text()
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    # As it would be read back: tuples have become lists.
    wanted = Header(**json.loads(json.dumps(asdict(header))))
    for name in ("plan", "machine", "versions"):
        old, new = getattr(results.header, name), getattr(wanted, name)
        if old != new:
            raise RecordsError(f"{path} is of another run ({name}: {old}, now {new}); --fresh starts anew")
    return results
