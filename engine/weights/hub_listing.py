"""Which files of a repository make a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import msgspec

from engine.errors import SourceError, UnsupportedModelError
from engine.weights.files import is_plain
from engine.weights.folder_choice import choose_files, is_folder, listed

_PART_OF_MANY = re.compile(r"-\d+-of-(\d+)\.gguf$")


class RemoteFile(msgspec.Struct, frozen=True):
    """A file of a repository. `checksum` is "sha256-" or "git-" (the SHA-1 of a git blob) and hexadecimal digits."""

    path: str
    size: int  # bytes
    checksum: str


class Listing(msgspec.Struct, frozen=True):
    """Files of a repository at a commit (40 hexadecimal digits)."""

    commit: str
    files: tuple[RemoteFile, ...]


def choose(
    listing: Listing, file: str | None, *, repo: str, revision: str, read: Callable[[RemoteFile], bytes]
) -> tuple[RemoteFile, ...]:
    """The files that make a checkpoint: safetensors with what goes with them, or one .gguf file (`file`, or the only).

    `read` gives the content of a small file. Raises SourceError, listing what is there, where that does not settle it,
    and UnsupportedModelError for one part of a split GGUF file.
    """
    there = {one.path: one for one in listing.files if is_plain(one.path)}
    models = {path: one for path, one in there.items() if path.endswith(".gguf")}
    where = f"hf:{repo} at {revision}"
    if file is not None:
        if file not in models:
            raise SourceError(f"{where} has no file {file!r}; its .gguf files are: {_listed(models.values())}.")
        return (_whole(models[file]),)
    if is_folder(sizes := {path: one.size for path, one in there.items()}):
        return tuple(there[path] for path in choose_files(sizes, where, lambda path: read(there[path])))
    if len(models) == 1:
        return (_whole(next(iter(models.values()))),)
    if models:
        raise SourceError(
            f"{where} has {len(models)} .gguf files: name one, as hf:{repo}:FILE. They are: {_listed(models.values())}."
        )
    raise SourceError(
        f"{where} has neither config.json with safetensors nor a .gguf file; it has: {_listed(there.values())}."
    )


def _whole(file: RemoteFile) -> RemoteFile:
    match = _PART_OF_MANY.search(file.path)
    if match is not None and int(match[1]) > 1:
        raise UnsupportedModelError(
            f"{file.path}: GGUF checkpoints split over several files are not supported ({int(match[1])} parts): merge "
            "them first."
        )
    return file


def _listed(files: Iterable[RemoteFile]) -> str:
    return listed({file.path: file.size for file in files})
