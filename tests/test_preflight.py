"""The preflight names what a machine lacks, and passes on one that lacks nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "preflight.sh"
TOOLS = ("awk", "bash", "env", "uname")  # what the script itself runs

NEW_GCC = "echo '#define __GNUC__ 13'"
GOOD_PYTHON = f'exec {sys.executable} "$@"'
LINUX = "echo Linux"


class Machine:
    """A PATH with nothing on it but what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (folder / tool).symlink_to(found)
        self.command("python3", GOOD_PYTHON)
        self.command("g++", NEW_GCC)
        self.command("make", "true")

    def command(self, name: str, script: str | None) -> None:
        """Install `name` as a shell script, or take it away."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        if script is not None:
            path.write_text(f"#!{self.folder}/bash\n{script}\n")
            path.chmod(0o755)

    def preflight(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / "bash", SCRIPT, *arguments],
            env={"PATH": str(self.folder), **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "bin")


def test_a_complete_machine_passes_and_names_its_python(machine: Machine) -> None:
    result = machine.preflight()
    assert (result.returncode, result.stderr) == (0, "")
    assert os.path.samefile(result.stdout.strip(), sys.executable)


@pytest.mark.parametrize(
    ("command", "script", "lacks", "debian", "fedora"),
    [
        ("make", None, "make", "apt-get install make", "dnf install make"),
        ("g++", None, "a C++20 compiler", "apt-get install g++", "dnf install gcc-c++"),
        ("g++", "echo '#define __GNUC__ 11'", "g++ is 11", "apt-get install g++-12", "gcc-toolset-12"),
        ("g++", "exit 1", "not a working compiler", "apt-get install g++-12", "gcc-toolset-12"),
        (
            "g++",
            "printf '#define __GNUC__ 4\\n#define __clang_major__ 13\\n'",
            "g++ is clang 13",
            "apt-get install g++",
            "dnf install gcc-c++",
        ),
        ("python3", None, "Python 3.11 or newer", "python3-venv python3-dev", "python3.11-devel"),
        ("python3", "exit 1", "Python 3.11 or newer", "python3-venv python3-dev", "python3.11-devel"),
        (
            "python3",
            f'case "$*" in *ensurepip*) exit 1;; esac; {GOOD_PYTHON}',
            "the venv module of",
            "apt-get install python3.",
            "dnf install python3.",
        ),
        (
            "python3",
            f'case "$*" in *Python.h*) exit 1;; esac; {GOOD_PYTHON}',
            "Python.h for",
            "-dev",
            "-devel",
        ),
    ],
)
def test_what_is_missing_is_named_with_its_packages(
    machine: Machine, command: str, script: str | None, lacks: str, debian: str, fedora: str
) -> None:
    machine.command(command, script)
    result = machine.preflight()
    assert (result.returncode, result.stdout) == (1, "")
    for expected in ("this machine lacks", lacks, debian, fedora):
        assert expected in result.stderr


def test_all_that_is_missing_is_named_at_once(machine: Machine) -> None:
    machine.command("make", None)
    machine.command("g++", None)
    result = machine.preflight()
    assert "C++20" in result.stderr and "install make" in result.stderr


def test_clang_serves_where_there_is_no_gcc(machine: Machine) -> None:
    machine.command("g++", None)
    machine.command("clang++", "printf '#define __GNUC__ 4\\n#define __clang_major__ 16\\n'")
    assert machine.preflight().returncode == 0


def test_a_named_compiler_and_python_are_the_ones_checked(machine: Machine) -> None:
    assert "oldpython is not one" in machine.preflight("oldpython").stderr
    assert "$CXX is missing-g++" in machine.preflight(CXX="missing-g++").stderr


def test_another_system_is_refused(machine: Machine) -> None:
    machine.command("uname", "echo Darwin")
    result = machine.preflight()
    assert result.returncode == 1
    assert "runs on Linux, this is Darwin" in result.stderr
