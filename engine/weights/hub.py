"""Checkpoints out of repositories of a Hugging Face hub, fetched once, resumed, and kept below `home`/hub.

    ORG--NAME.lock                   held by whoever changes the folder beside it
    ORG--NAME/records/DIGEST.json    one per source: the commit it stands for, and its files with their checksums
    ORG--NAME/blobs/CHECKSUM         whole files, verified; CHECKSUM.part is one that has not arrived whole
    ORG--NAME/COMMIT/PATH            links to blobs: the checkpoint as it is read
    ORG--NAME/removing               a removal was begun: what no record names is garbage

A record is written when its blobs are whole, so what it names is there; blobs that no record names belong to a fetch
that goes on or will be gone on with. Nothing here asks the hub where a record and its files exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.weights.files import free_bytes, lock, need_space, publish, try_lock, writing
from engine.weights.hub_listing import Listing, RemoteFile, choose
from engine.weights.progress import Progress

if TYPE_CHECKING:
    from engine.weights.hub_client import HubClient

logger = logging.getLogger(__name__)

DEFAULT_REVISION = "main"

_COMMIT = re.compile("[0-9a-f]{40}")
_MARK = "removing"


@dataclass(frozen=True, slots=True)
class HubCheckpoint:
    """A checkpoint in a repository: its one .gguf file `file`, or (None) what `choose` finds there."""

    repo: str  # organization/name
    revision: str = DEFAULT_REVISION
    file: str | None = None

    @property
    def source(self) -> str:
        """The source that names it, without what goes without saying."""
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"hf:{self.repo}{revision}" + (f":{self.file}" if self.file else "")

    def folder(self, home: Path) -> Path:
        return home / "hub" / self.repo.replace("/", "--")


class Record(msgspec.Struct, frozen=True):
    """What a source stood for when it was last fetched."""

    repo: str
    revision: str
    file: str | None
    listing: Listing  # of the files that were chosen

    @property
    def wanted(self) -> HubCheckpoint:
        return HubCheckpoint(self.repo, self.revision, self.file)

    @property
    def is_gguf(self) -> bool:
        return self.listing.files[0].path.endswith(".gguf")

    @property
    def stamp(self) -> str:
        """Changes with the files, but not with a commit that leaves them as they are."""
        return hashlib.sha256(msgspec.json.encode(self.listing.files)).hexdigest()

    def path(self, home: Path) -> Path:
        """The .gguf file, or the folder of config.json and weights."""
        folder = self.wanted.folder(home) / self.listing.commit
        return folder / self.listing.files[0].path if self.is_gguf else folder


def fetch(
    wanted: HubCheckpoint,
    home: Path,
    progress: Progress,
    *,
    refresh: bool = False,
    client: HubClient | None = None,
    free: Callable[[Path], int] = free_bytes,
) -> Record:
    """The record of a checkpoint whose files are on this machine, fetched where they are not.

    With `refresh` a branch or tag is looked up again, and what has changed is fetched. `client` None: the hub that the
    environment names. Raises SourceError where the checkpoint is not there or cannot be fetched, verified or stored,
    UnsupportedModelError for one part of a split GGUF file.
    """
    fixed = _COMMIT.fullmatch(wanted.revision) is not None
    if (not refresh or fixed) and (record := complete(wanted, home)) is not None:
        return record
    folder, purpose = wanted.folder(home), f"fetching {wanted.source}"
    with lock(_lock_path(folder), purpose), writing(home / "hub", 0, purpose):
        _collect_if_marked(folder)
        if (not refresh or fixed) and (record := complete(wanted, home)) is not None:
            return record  # another process fetched it while we waited
        if client is None:
            # Imported here: only a fetch needs the hub's client library.
            from engine.weights.hub_client import HubClient

            client = HubClient()
        listing = client.listing(wanted.repo, wanted.revision)
        transfer = _Transfer(wanted.repo, listing.commit, folder / "blobs", client, progress, free)
        files = choose(
            listing,
            wanted.file,
            repo=wanted.repo,
            revision=wanted.revision,
            read=lambda file: transfer.get([file], file.path)[0].read_bytes(),
        )
        transfer.get(files, wanted.source)
        record = Record(wanted.repo, wanted.revision, wanted.file, Listing(listing.commit, files))
        _link(record, home)
        _write_record(record, home)
        _collect_garbage(folder)
    return record


def complete(wanted: HubCheckpoint, home: Path) -> Record | None:
    """The record of a checkpoint if all its files are there."""
    record = _read_record(_record_path(wanted, home))
    return record if record is not None and _is_linked(record, home) else None


def records(home: Path) -> Iterator[Record]:
    """Every checkpoint whose files are there."""
    for path in sorted((home / "hub").glob("*/records/*.json")):
        record = _read_record(path)
        if record is not None and _is_linked(record, home):
            yield record


def unfinished(home: Path) -> Iterator[tuple[str, int]]:
    """Repositories, as sources, with bytes of fetches that have not come to their end."""
    for folder in sorted(path.parent for path in (home / "hub").glob("*/blobs")):
        named = {file.checksum for record in _records(folder) for file in record.listing.files}
        nbytes = 0
        for path in (folder / "blobs").glob("*"):
            with contextlib.suppress(FileNotFoundError):  # became whole, or was removed, since it was listed
                nbytes += path.stat().st_size if path.name not in named else 0
        if nbytes:
            yield f"hf:{folder.name.replace('--', '/')}", nbytes


def forget(wanted: HubCheckpoint, home: Path) -> int:
    """Remove what was fetched for a checkpoint, finished or not, and return how many bytes that freed.

    Files that another source of the same repository names stay.
    """
    folder, purpose = wanted.folder(home), f"removing {wanted.source}"
    if not folder.is_dir():
        return 0
    with lock(_lock_path(folder), purpose), writing(folder, 0, purpose):
        before = _nbytes(folder)
        (folder / _MARK).touch()  # first, so that a killed removal is finished by the next command
        _record_path(wanted, home).unlink(missing_ok=True)
        _collect_garbage(folder)
        return before - _nbytes(folder)


def sweep(home: Path) -> None:
    """Finish what killed removals have begun."""
    for mark in sorted((home / "hub").glob(f"*/{_MARK}")):
        folder = mark.parent
        with try_lock(_lock_path(folder), f"clearing {folder}") as held, writing(folder, 0, f"clearing {folder}"):
            if held:
                _collect_if_marked(folder)


class _Transfer:
    """Brings files of one commit into a folder of blobs."""

    def __init__(
        self,
        repo: str,
        commit: str,
        blobs: Path,
        client: HubClient,
        progress: Progress,
        free: Callable[[Path], int],
    ) -> None:
        self._repo = repo
        self._commit = commit
        self._blobs = blobs
        self._client = client
        self._progress = progress
        self._free = free

    def get(self, files: Sequence[RemoteFile], label: str) -> list[Path]:
        """The blobs of `files`, fetched where they are not whole. Space is looked for before anything is fetched."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not _has_size(self._blobs / file.checksum, file.size)]
        if missing:
            parts = {file.checksum: self._blobs / f"{file.checksum}.part" for file in missing}
            arrived = sum(path.stat().st_size for path in parts.values() if path.exists())
            total = sum(file.size for file in missing)
            need_space(self._blobs, max(0, total - arrived), f"fetching {label}", free=self._free)
            self._progress.start(f"Fetching {label}", total)
            try:
                for file in missing:
                    part = parts[file.checksum]
                    self._client.download(self._repo, self._commit, file, part, self._progress)
                    publish(part, self._blobs / file.checksum)
            finally:
                self._progress.done()
        return [self._blobs / file.checksum for file in files]


def _link(record: Record, home: Path) -> None:
    """Lay out the checkpoint as links to its blobs. What is there already stays."""
    folder = record.wanted.folder(home)
    for file in record.listing.files:
        link = folder / record.listing.commit / file.path
        target = os.path.relpath(folder / "blobs" / file.checksum, link.parent)
        if link.is_symlink() and os.readlink(link) == target:
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f"{link.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)


def _is_linked(record: Record, home: Path) -> bool:
    folder = record.wanted.folder(home) / record.listing.commit
    return all(_has_size(folder / file.path, file.size) for file in record.listing.files)


def _has_size(path: Path, size: int) -> bool:
    """Whether a file is there. It was verified before it got its name, so its size is enough to look at."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _record_path(wanted: HubCheckpoint, home: Path) -> Path:
    digest = hashlib.sha256(wanted.source.encode()).hexdigest()[:16]
    return wanted.folder(home) / "records" / f"{digest}.json"


def _write_record(record: Record, home: Path) -> None:
    path = _record_path(record.wanted, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(record))
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def _read_record(path: Path) -> Record | None:
    try:
        record = msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("%s is fetched again: %s", path, error)
        return None
    return record if record.listing.files else None


def _records(folder: Path) -> list[Record]:
    found = map(_read_record, sorted((folder / "records").glob("*.json")))
    return [record for record in found if record is not None]


def _collect_if_marked(folder: Path) -> None:
    if (folder / _MARK).exists():
        _collect_garbage(folder)


def _collect_garbage(folder: Path) -> None:
    """Remove what no record names, and the folder with its last record. The caller holds the lock."""
    mark = folder / _MARK
    mark.touch()  # from here on, whoever comes next finishes it
    kept = _records(folder)
    named = {folder / "blobs" / file.checksum for record in kept for file in record.listing.files}
    named |= {folder / record.listing.commit / file.path for record in kept for file in record.listing.files}
    named |= {_record_path(record.wanted, folder.parent.parent) for record in kept}
    for parent, folders, names in os.walk(folder, topdown=False):
        for path in (Path(parent) / name for name in names):
            if path not in named and path != mark:
                path.unlink(missing_ok=True)
        for path in (Path(parent) / name for name in folders):
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
    mark.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _nbytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
