"""Folders out of wheels as they lie in the cache.

Each has a record of its files, written when they are all there and removed before the first of them is: a folder is
what its record says, or it is not there. Others may lie in it, and a file may belong to several of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from engine.weights.files import is_plain, publish

RECORD = ".fetched.json"


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: dict[str, int]  # path from the folder on -> bytes


def files_of(folder: Path) -> Mapping[str, int] | None:
    """The files of a folder, named from there on, and their bytes; None where they are not all there."""
    try:
        files = msgspec.json.decode((folder / RECORD).read_bytes(), type=_Record).files
        # They were verified before the record was written, so their sizes are enough to look at.
        whole = all(is_plain(name) and (folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return files if whole and files else None


def withdraw(folder: Path) -> None:
    """Make a folder one that is not there; its files are nobody's from then on."""
    if folder.is_dir():
        (folder / RECORD).unlink(missing_ok=True)


def put(unpacked: Path, files: Mapping[str, int], folder: Path) -> None:
    """Move files, complete and synced, from `unpacked` to a folder that is not there; then it is."""
    record = unpacked.with_name("record")
    with record.open("wb") as file:
        file.write(msgspec.json.encode(_Record(dict(files))))
        file.flush()
        os.fsync(file.fileno())
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        publish(unpacked / name, folder / name)
    publish(record, folder / RECORD)


def remove(folder: Path, release: Path) -> int:
    """Remove the files of a folder, but for those that another folder of the same wheel (below `release`) has, too.

    Returns the bytes that this freed.
    """
    files = files_of(folder) or {}
    withdraw(folder)
    others = set(recorded(release))
    freed = 0
    for name, size in files.items():
        if folder / name not in others:
            (folder / name).unlink(missing_ok=True)
            freed += size
    return freed


def recorded(release: Path) -> Iterator[Path]:
    """Every file of the folders below one for a wheel, and their records."""
    for record in release.rglob(RECORD):
        if files := files_of(record.parent):
            yield record
            yield from (record.parent / name for name in files)
