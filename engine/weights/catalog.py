"""The models that have a short name."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources

import msgspec


class CatalogFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in a wheel."""

    distribution: str
    version: str
    file: str  # its path inside the wheel
    file_bytes: int
    file_sha256: str
    wheel_bytes: int
    wheel_sha256: str


class CatalogEntry(CatalogFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of `catalog.toml`: what it is, and where its one file comes from.

    With `parts` it is what they are one after another, `file` only a name, and `wheel_bytes` of all their wheels.
    """

    name: str
    description: str
    license: str
    parameters: int
    format: str  # as "Q4_1 GGUF"
    wheel_sha256: str = ""  # none of a file in parts
    parts: tuple[CatalogFile, ...] = ()
    generation: dict[str, float] = {}  # as ModelInfo.generation_defaults, over what the checkpoint says itself


@functools.cache
def catalog() -> tuple[CatalogEntry, ...]:
    """Every model that has a short name, in the file's order."""
    tables = tomllib.loads(resources.files("engine.weights").joinpath("catalog.toml").read_text("utf-8"))
    return tuple(msgspec.convert({"name": name, **table}, CatalogEntry) for name, table in tables.items())
