"""Virtual environments of the peers: made once, used from then on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from loadtests.peers.processes import output_of
from loadtests.peers.systems import Environment

INSTALL_SECONDS = 3600.0  # llama.cpp is compiled on this machine
STAMP = "installed.json"


def python_of(name: str, environment: Environment, *, given: Mapping[str, Path], folder: Path, logs: Path) -> Path:
    """The Python of an environment: of the one that was given by name, else of one in `folder`, which is made where it
    is missing or was made for other requirements. Raises SystemFailure where pip fails."""
    if name in given:
        return given[name] / "bin" / "python"
    home = folder / name
    python = home / "bin" / "python"
    wanted = json.dumps([environment.requirements, environment.unwanted])
    stamp = home / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    log = logs / f"install-{name}.log"
    shutil.rmtree(home, ignore_errors=True)
    output_of([sys.executable, "-m", "venv", home], log=log, seconds=120)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    output_of([*pip, "install", *environment.requirements], log=log, seconds=INSTALL_SECONDS)
    if environment.unwanted:
        output_of([*pip, "uninstall", "-y", *environment.unwanted], log=log, seconds=300)
    stamp.write_text(wanted)  # last, so that an interrupted installation is made again
    return python
