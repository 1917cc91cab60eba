"""How a setting is declared: its kind, and its names on the command line, in the environment and in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import MEMORY_FORMS, parse_memory
from engine.errors import ConfigError


class Refused(ValueError):
    """A value that cannot be, and why: what its kind allows does not say it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a setting's text becomes its value. `parse` raises ValueError; `allowed` completes "must be ..."."""

    allowed: str
    parse: Callable[[str], Any]
    metavar: str
    stored: tuple[type, ...] = (str,)  # what a configuration file may hold; anything but text is parsed as its text
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as the command line, the environment and a configuration file see it."""

    name: str  # the field of Settings
    help: str
    kind: Kind
    default: Any
    group: str  # the section of --help and of docs/configuration.md
    shown_default: str = ""  # what to show where the default itself says little
    environment: str = ""  # the name where it is not SERAPH_ and the field's
    repeatable: bool = False
    greedy: bool = False  # a repeatable one whose flag takes several values
    positional: bool = False
    secret: bool = False  # its value appears in no message
    in_file: bool = True

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else "--" + self.key

    @property
    def environment_name(self) -> str:
        return self.environment or "SERAPH_" + self.name.upper()

    @property
    def key(self) -> str:
        """The name in a configuration file."""
        return self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return self.kind is SWITCH

    @property
    def default_text(self) -> str:
        """The default for people; empty where there is none."""
        if self.shown_default or self.default in (None, ()):
            return self.shown_default
        if self.repeatable:
            return ", ".join(map(str, self.default))
        return str(self.default).lower() if self.is_switch else str(self.default)

    def parse(self, where: str, text: str) -> Any:
        """The value of a text. Raises ConfigError naming `where`, the value (unless secret) and what is allowed."""
        try:
            return self.kind.parse(text)
        except Refused as error:
            raise self.wrong(where, text, str(error)) from None
        except ValueError:
            raise self.wrong(where, text) from None

    def parse_stored(self, where: str, value: Any) -> Any:
        """The value of what a configuration file holds. Raises ConfigError as `parse`."""
        if not self.repeatable:
            return self._parse_item(where, value)
        if self.positional and isinstance(value, str):  # one, as most often
            value = [value]
        if not isinstance(value, list):
            raise self.wrong(where, value, article="a list, each item ")
        return tuple(self._parse_item(where, item) for item in value)

    def wrong(self, where: str, value: Any, why: str = "", article: str = "") -> ConfigError:
        """The error that says so."""
        got = "another value" if self.secret else repr(value)
        return ConfigError(f"{where} must be {article}{self.kind.allowed}, got {got}{': ' + why if why else ''}.")

    def _parse_item(self, where: str, value: Any) -> Any:
        if type(value) not in self.kind.stored:
            raise self.wrong(where, value)
        if isinstance(value, str):
            return self.parse(where, value)
        try:
            return self.kind.parse(json.dumps(value))
        except (ValueError, TypeError) as error:  # TypeError: a date within a table
            raise self.wrong(where, value, str(error) if isinstance(error, Refused) else "") from None


def option(default: Any, help: str, kind: Kind, group: str, **names: Any) -> Any:
    """A dataclass field that carries its whole declaration: the arguments of Option."""
    return dataclasses.field(
        default=default, metadata={"help": help, "kind": kind, "default": default, "group": group, **names}
    )


def choice(*choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Kind("one of " + ", ".join(choices), parse, "|".join(choices), choices=choices)


def integer(low: int, high: int, what: str = "N") -> Kind:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return Kind(f"a whole number between {low} and {high}", parse, what, stored=(int,))


def seconds(low: float, high: float) -> Kind:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # written so that NaN fails it
            raise ValueError(text)
        return value

    return Kind(f"a number of seconds between {low:g} and {high:g}", parse, "SECONDS", stored=(int, float))


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What a generation_config.json, or an object in its place, holds; it is read for its meaning when it is used."""

    values: dict[str, Any]
    where: str  # the file, for messages


def _switch(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _nonempty(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def _file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(text)
    return path


def _memory(text: str) -> str:
    parse_memory(text)
    return text


def _generation_config(text: str) -> str | GenerationConfig:
    if text in ("auto", "none"):
        return text
    if text.lstrip().startswith("{"):
        return GenerationConfig(_json_object(text, "it"), "the given object")
    path = Path(text).expanduser()
    if path.is_dir():
        path /= "generation_config.json"
    if not path.is_file():
        raise ValueError(text)
    try:
        return GenerationConfig(_json_object(path.read_text("utf-8"), str(path)), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from None


def _json_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(f"{what} is no JSON object")
    return value


SWITCH = Kind("true or false", _switch, "", stored=(bool,))
TEXT = Kind("a text that is not empty", _nonempty, "TEXT")
SOURCE = Kind("a text that is not empty", _nonempty, "MODEL")
FILE = Kind("the path of an existing file", _file, "FILE")
MEMORY = Kind(MEMORY_FORMS, _memory, "SIZE", stored=(str, int))
GENERATION = Kind(
    "auto, none, the path of a generation_config.json or of a folder with one, or a JSON object",
    _generation_config,
    "auto|none|PATH|JSON",
    stored=(str, dict),
    choices=("auto", "none"),
)


def nearest(name: str, known: Iterable[str]) -> str:
    """The one of `known` that `name` most likely stands for."""
    from difflib import SequenceMatcher  # only where something is wrong

    return max(known, key=lambda one: SequenceMatcher(None, name, one).ratio())
