"""Which files of a repository make a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import msgspec

from engine.errors import SourceError, UnsupportedModelError
from engine.weights.files import is_plain

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


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def choose(
    listing: Listing, file: str | None, *, repo: str, revision: str, read: Callable[[RemoteFile], bytes]
) -> tuple[RemoteFile, ...]:
    """The files that make a checkpoint: safetensors with what goes with them, or one .gguf file (`file`, or the only).

    Weights come in no other format (.bin and .pt files can run code), and once: copies in folders of their own are
    left out. `read` gives the content of a small file. Raises SourceError, listing what is there, where that does not
    settle it, and UnsupportedModelError for one part of a split GGUF file.
    """
    # Imported here: naming a hub source does not need what reads checkpoints.
    from engine.weights.folder import TEXT_FILES

    there = {one.path: one for one in listing.files if is_plain(one.path)}
    models = {path: one for path, one in there.items() if path.endswith(".gguf")}
    where = f"hf:{repo} at {revision}"
    if file is not None:
        if file not in models:
            raise SourceError(f"{where} has no file {file!r}; its .gguf files are: {_listed(models.values())}.")
        return (_whole(models[file]),)
    if "config.json" in there and any(_is_weights(path) for path in there):
        text = [there[name] for name in TEXT_FILES if name in there]
        return (*text, *_weights(there, where, read))
    if len(models) == 1:
        return (_whole(next(iter(models.values()))),)
    if models:
        raise SourceError(
            f"{where} has {len(models)} .gguf files: name one, as hf:{repo}:FILE. They are: {_listed(models.values())}."
        )
    raise SourceError(
        f"{where} has neither config.json with safetensors nor a .gguf file; it has: {_listed(there.values())}."
    )


def _weights(there: Mapping[str, RemoteFile], where: str, read: Callable[[RemoteFile], bytes]) -> list[RemoteFile]:
    """The weights as `engine.weights.folder` will look for them: one whole file, else those of the index."""
    from engine.weights.folder import INDEX, WHOLE

    if WHOLE in there:
        return [there[WHOLE]]
    if INDEX in there:
        try:
            names = sorted(set(msgspec.json.decode(read(there[INDEX]), type=_Index).weight_map.values()))
        except msgspec.MsgspecError as error:
            raise SourceError(f"{where}: {INDEX} cannot be read: {error}.") from error
        missing = [name for name in names if name not in there or not _is_weights(name)]
        if missing or not names:
            raise SourceError(f"{where}: {INDEX} names no weights or weights that are not there: {missing[:5]}.")
        return [there[INDEX], *(there[name] for name in names)]
    found = [there[path] for path in there if _is_weights(path)]
    if len(found) > 1:
        raise SourceError(f"{where}: expected {WHOLE}, {INDEX} or one .safetensors file, found {_listed(found)}.")
    return found


def _is_weights(path: str) -> bool:
    return "/" not in path and path.endswith(".safetensors")


def _whole(file: RemoteFile) -> RemoteFile:
    match = _PART_OF_MANY.search(file.path)
    if match is not None and int(match[1]) > 1:
        raise UnsupportedModelError(
            f"{file.path}: GGUF checkpoints split over several files are not supported ({int(match[1])} parts): merge "
            "them first."
        )
    return file


def _listed(files: Iterable[RemoteFile], most: int = 12) -> str:
    every = [f"{file.path} ({file.size / 1e6:,.1f} MB)" for file in files]
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest or "none"
