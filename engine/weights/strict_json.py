"""JSON objects of files that we do not trust: of bounded size, every key once."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import FormatError, SourceError

MAX_JSON_BYTES = 8 << 20
"""About 50,000 tensors of an index or a header; parsing takes a few dozen times as much memory at worst."""


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises SourceError where it cannot be read, FormatError where it is too large or anything but an object whose keys
    are all different.
    """
    return decode_object(read_bounded(path), path, offset=0)


def read_bounded(path: Path) -> bytes:
    """A file of at most MAX_JSON_BYTES. Raises SourceError where it cannot be read, FormatError where it is larger."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise SourceError(f"cannot read {path}: it is not a file.")
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}.") from error
    if len(raw) > MAX_JSON_BYTES:
        raise FormatError(f"expected at most {MAX_JSON_BYTES} bytes of JSON, found more", path=path)
    return raw


def decode_object(raw: bytes, path: Path, *, offset: int) -> dict[str, object]:
    """`raw`, bytes from `offset` of the file at `path`, as a JSON object. Raises FormatError where it is none."""
    try:
        values = json.loads(raw.decode(), object_pairs_hook=_with_unique_keys)
    except UnicodeDecodeError as error:
        raise FormatError(f"expected UTF-8: {error.reason}", path=path, offset=offset + error.start) from None
    except json.JSONDecodeError as error:
        at = offset + len(error.doc[: error.pos].encode())
        raise FormatError(f"expected JSON: {error.msg}", path=path, offset=at) from None
    except RecursionError:
        raise FormatError("expected JSON, found arrays or objects nested too deep", path=path, offset=offset) from None
    except ValueError as error:  # a key that is given twice, an integer of thousands of digits
        raise FormatError(f"expected JSON: {error}", path=path, offset=offset) from None
    if not isinstance(values, dict):
        raise FormatError(f"expected a JSON object, found {type(values).__name__}", path=path, offset=offset)
    return values


def _with_unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Readers differ in which of two equal keys they take: refuse them."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} is given twice")
    return values
