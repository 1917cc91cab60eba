"""Files that other processes may read or write at the same time: locks, space, and what killed runs left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from engine.errors import FormatError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def is_plain(path: str) -> bool:
    """Whether somebody else's path stays inside the folder it is put under, and has only this one spelling."""
    parts = PurePosixPath(path)
    return (
        not parts.is_absolute() and ".." not in parts.parts and str(parts) == path and path != "." and "\0" not in path
    )


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of `folder`."""
    return shutil.disk_usage(folder).free


def need_space(folder: Path, num_bytes: int, purpose: str, *, free: Callable[[Path], int] = free_bytes) -> None:
    """Raise SourceError unless `num_bytes` fit into `folder`."""
    available = free(folder)
    if available < num_bytes:
        raise _no_space(folder, num_bytes, available, purpose)


@contextlib.contextmanager
def writing(folder: Path, num_bytes: int, purpose: str) -> Iterator[None]:
    """Turn what a full, forbidden or failing disk raises into a SourceError that says what was being done."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(folder, num_bytes, free_bytes(folder), purpose) from error
        raise SourceError(f"{purpose} in {folder} failed: {error.strerror or error}.") from error


def _no_space(folder: Path, needed: int, available: int, purpose: str) -> SourceError:
    return SourceError(
        f"no space left in {folder}: {purpose} needs {needed / 1e6:.1f} MB, {available / 1e6:.1f} MB are free."
    )


@contextlib.contextmanager
def lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; wait while another process (or thread) holds it.

    The kernel drops the lock with its holder, so a killed process never leaves one behind. The file itself stays:
    removing it would let two processes lock two different files of one name.
    """
    handle = _open_lock(path, purpose)
    try:
        if not _acquire(handle):
            logger.info("waiting for another process: %s", purpose)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def try_lock(path: Path, purpose: str) -> Iterator[bool]:
    """The same without waiting: whether the lock is held inside."""
    handle = _open_lock(path, purpose)
    try:
        yield _acquire(handle)
    finally:
        os.close(handle)


def _open_lock(path: Path, purpose: str) -> int:
    with writing(path.parent, 0, purpose):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _acquire(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def publish(temporary: Path, target: Path) -> None:
    """Rename a complete, synced file into place, and make the rename itself survive a power cut."""
    os.replace(temporary, target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_rows(
    file: BufferedReader, path: Path, name: str, offset: int, num_rows: int, row_bytes: int
) -> NDArray[np.uint8]:
    """The bytes from `offset` on as uint8 [num_rows, row_bytes]. Raises FormatError, which names the tensor, where the
    file has fewer than when its header was read."""
    import numpy as np  # here: what only names files needs no arrays

    raw = np.empty((num_rows, row_bytes), np.uint8)
    file.seek(offset)
    got = file.readinto(raw.reshape(-1).data)
    if got != raw.nbytes:
        raise FormatError(
            f"tensor {name}: expected {raw.nbytes} bytes, got {got}: the file shrank while it was read",
            path=path,
            offset=offset,
        )
    return raw
