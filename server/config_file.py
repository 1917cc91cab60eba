"""A configuration file: TOML with the settings' names as its keys, with - or _. There are no tables to learn."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from server.options import Option, nearest


def read(path: Path, options: Iterable[Option]) -> dict[str, Any]:
    """The settings that a file gives, by their names, parsed.

    Raises ConfigError naming the file, the line where it can be told, the key and what is allowed, or for an unknown
    key the nearest one there is.
    """
    try:
        text = path.read_text("utf-8")
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise ConfigError(f"{path} is not a TOML file: {error}.") from None
    known = {option.key: option for option in options if option.in_file}
    values: dict[str, Any] = {}
    for written, value in document.items():
        where, key = f"{path}{_line_of(written, text)}: {written}", written.replace("_", "-")
        declared = known.get(key)
        if declared is None:
            raise ConfigError(f"{where} is not a setting; the nearest one is {nearest(key, known)}.")
        if declared.name in values:
            raise ConfigError(f"{where} is given twice, with - and with _.")
        values[declared.name] = declared.parse_stored(where, value)
    return values


def _line_of(key: str, text: str) -> str:
    """ ":7" where exactly one line looks as if it gave that key or opened a table of that name, else nothing."""
    name = re.escape(key)
    pattern = re.compile(rf"""^[ \t]*(?:(["']?){name}\1[ \t]*[.=]|\[+[ \t]*(["']?){name}\2[ \t]*[].])""", re.MULTILINE)
    places = [match.start() for match in pattern.finditer(text)]
    return f":{text.count(chr(10), 0, places[0]) + 1}" if len(places) == 1 else ""
