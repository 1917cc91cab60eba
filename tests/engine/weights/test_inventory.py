from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.config import DEFAULT_MODEL
from engine.errors import SourceError
from engine.weights import installed, known, load_model, pypi_folder, remove, sweep, unfinished
from engine.weights.catalog import catalog
from engine.weights.described import describe_model
from engine.weights.files import lock
from engine.weights.hub_client import HubClient
from engine.weights.inventory import InstalledModel
from engine.weights.progress import NoProgress
from engine.weights.source import WheelSource, locate, parse
from tests.engine.weights.hubs import Hub, serve_hub
from tests.tiny_gguf import TinyLlama


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def remote() -> Iterator[Hub]:
    with serve_hub() as running:
        yield running


def client(remote: Hub) -> HubClient:
    return HubClient(endpoint=remote.url, token="", pause=lambda seconds: None)


def files(home: Path) -> set[str]:
    """Every file under home, but the locks."""
    return {str(path.relative_to(home)) for path in home.rglob("*") if not path.is_dir() and path.suffix != ".lock"}


def by_name(home: Path) -> dict[str, InstalledModel]:
    return {model.name: model for model in installed(home)}


def test_an_empty_home(home: Path) -> None:
    assert (installed(home), unfinished(home)) == ([], [])
    sweep(home)
    assert not home.exists()
    with pytest.raises(SourceError, match=r"'x\.gguf' is not in the cache\. There is: nothing"):
        remove(["x.gguf"], home)


def test_packed_and_fetched_models(home: Path, tmp_path: Path) -> None:
    checkpoint = TinyLlama(quant="BF16").write(tmp_path / "mine.gguf")
    packed = [load_model(str(checkpoint), home=home, quantization=kind) for kind in (None, "int8")]
    default = parse(DEFAULT_MODEL)
    assert isinstance(default, WheelSource)
    fetched, other = default.checkpoint.path(home), home / "models/x-y-1.0/z/z.Q8_0.gguf"
    for path, size in ((fetched, 7), (other, 5), (home / "models/.x-2.fetching/member.gguf", 3)):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    assert installed(home) == [
        InstalledModel(
            "mine",
            str(checkpoint),
            "BF16 GGUF",
            packed={model.path: model.source.quantization for model in reversed(packed)},
            nbytes=sum(model.nbytes for model in packed),
            kind="decoder",
        ),
        InstalledModel(DEFAULT_MODEL, default.origin, "GGUF", fetched=fetched, nbytes=7, kind="decoder"),
        InstalledModel("z.Q8_0", "pypi:x-y==1.0/z/z.Q8_0.gguf", "GGUF", fetched=other, nbytes=5),
    ]
    assert remove([DEFAULT_MODEL, "z.Q8_0"], home) == [(DEFAULT_MODEL, 7), ("z.Q8_0", 5)]
    assert not fetched.parent.exists()
    assert remove(["mine"], home) == [("mine", sum(model.nbytes for model in packed))]
    assert checkpoint.exists()
    assert files(home) == {"models/.x-2.fetching/member.gguf"}
    sweep(home)
    assert files(home) == set()


def put_folder(folder: Path, contents: dict[str, bytes]) -> None:
    """A folder as it is fetched out of a wheel."""
    unpacked = folder.parents[2] / ".x.fetching/folder"
    for name, data in contents.items():
        (unpacked / name).parent.mkdir(parents=True, exist_ok=True)
        (unpacked / name).write_bytes(data)
    pypi_folder.put(unpacked, {name: len(data) for name, data in contents.items()}, folder)
    shutil.rmtree(unpacked.parent)


def test_folders_out_of_wheels(home: Path) -> None:
    source = parse("all-minilm-l6-v2")
    assert isinstance(source, WheelSource)
    path, other = source.checkpoint.path(home), home / "models/x-y-1.0/z/tiny-v1.5"
    for folder in (path, other):
        put_folder(folder, {"config.json": b"{}", "1_Pooling/config.json": b"{}", "model.safetensors": b"weights"})
    assert installed(home) == [
        InstalledModel(source.name, source.origin, "safetensors", fetched=path, nbytes=11, kind="encoder"),
        InstalledModel("tiny-v1.5", "pypi:x-y==1.0/z/tiny-v1.5", "safetensors", fetched=other, nbytes=11),
    ]
    (other / "model.safetensors").write_bytes(b"")  # then it is not there
    assert list(by_name(home)) == [source.name]
    sweep(home)
    assert remove([str(path)], home) == [(source.name, 11)]
    assert files(home) == set()
    assert not any(one.is_dir() for one in (home / "models").iterdir())


def test_what_can_be_loaded_by_a_name(home: Path, tmp_path: Path, remote: Hub) -> None:
    aliases = [entry.name for entry in catalog()]
    assert known(home) == aliases
    remote.repository("org/name").commit({"m.gguf": TinyLlama().write(tmp_path / "mine.gguf").read_bytes()})
    load_model("hf:org/name", home=home, client=client(remote))
    load_model(str(tmp_path / "mine.gguf"), home=home)  # which goes by its path
    default = parse(DEFAULT_MODEL)
    assert isinstance(default, WheelSource)
    for path in (default.checkpoint.path(home), home / "models/x-y-1.0/z/z.Q8_0.gguf"):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    put_folder(home / "models/x-y-1.0/z/folder", {"config.json": b"{}", "1_Pooling/config.json": b"{}"})
    assert known(home) == [*aliases, "hf:org/name", "pypi:x-y==1.0/z/folder", "pypi:x-y==1.0/z/z.Q8_0.gguf"]
    for name in (DEFAULT_MODEL, *known(home)[len(aliases) :]):
        assert parse(name).origin in {model.source for model in installed(home)}
    remove(["hf:org/name"], home)
    assert "hf:org/name" not in known(home)


def test_a_model_that_is_mapped_can_be_removed(home: Path, tmp_path: Path) -> None:
    checkpoint = TinyLlama().write(tmp_path / "mine.gguf")
    model = load_model(str(checkpoint), home=home)
    before = model.weights["embed"].data.copy()
    remove([str(checkpoint)], home)
    assert not model.path.exists()
    np.testing.assert_array_equal(model.weights["embed"].data, before)
    again = load_model(str(checkpoint), home=home)
    np.testing.assert_array_equal(again.weights["embed"].data, before)


def test_names_that_mean_several_models_are_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first = TinyLlama().write(tmp_path / "tiny.gguf")
    second = TinyLlama(seed=1).write(tmp_path / "other/tiny.gguf")
    paths = [load_model(str(one), home=home).path for one in (first, second)]
    with pytest.raises(SourceError, match=rf"'tiny' means 2 models: name one by its source: {second}, {first}"):
        remove(["tiny"], home)
    with pytest.raises(SourceError, match=r"'gpt-5' is not in the cache\. There is: tiny, tiny"):
        remove([str(first), "gpt-5"], home)
    assert all(path.exists() for path in paths)  # none is removed before all are known
    remove([str(first), str(paths[1]), str(first)], home)
    assert installed(home) == []


def test_files_of_the_users_own_are_never_removed(home: Path, tmp_path: Path) -> None:
    checkpoint = TinyLlama().write(tmp_path / "mine.gguf")
    with pytest.raises(SourceError, match=r"mine\.gguf' is not in the cache; it is a file of your own\."):
        remove([str(checkpoint)], home)
    packed = load_model(str(checkpoint), home=home).path
    own = packed.rename(tmp_path / "own.seraph")
    with pytest.raises(SourceError, match="it is a file of your own"):
        remove([str(own)], home)
    assert own.exists()


def test_a_relative_path_is_the_same_source(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model(str(TinyLlama().write(tmp_path / "mine.gguf")), home=home)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gguf").unlink()  # the checkpoint need not be there any more
    assert [name for name, _ in remove(["./mine.gguf"], home)] == ["mine"]


@pytest.mark.parametrize("keep", [0, 100])
def test_damaged_packed_files_are_listed_and_can_be_removed(home: Path, tmp_path: Path, keep: int) -> None:
    checkpoint = TinyLlama().write(tmp_path / "mine.gguf")
    path = load_model(str(checkpoint), home=home).path
    path.write_bytes(path.read_bytes()[:keep])
    (home / "packed/strange.seraph").write_bytes(b"not ours")
    assert installed(home) == [InstalledModel("mine", damaged=[path], nbytes=keep)]
    assert remove(["mine"], home) == [("mine", keep)]
    assert files(home) == {"packed/strange.seraph"}
    assert installed(home) == []


def test_repositories(home: Path, remote: Hub, tmp_path: Path) -> None:
    data = TinyLlama().write(tmp_path / "tiny.gguf").read_bytes()
    commit = remote.repository("org/tiny").commit({"a.gguf": data, "b.gguf": data[:1000], "c.gguf": b"c" * 3000})
    model = load_model("hf:org/tiny:a.gguf", home=home, client=client(remote))
    locate(parse("hf:org/tiny:b.gguf"), home, NoProgress(), client=client(remote))
    found = by_name(home)
    assert found["a"].packed == {model.path: None}
    assert (found["a"].source, found["a"].format, found["a"].commit) == ("hf:org/tiny:a.gguf", "Q4_1 GGUF", commit)
    assert found["a"].nbytes == model.nbytes + len(data)
    assert (found["b"].source, found["b"].format, found["b"].packed) == ("hf:org/tiny:b.gguf", "GGUF", {})
    assert found["b"].fetched is not None
    assert found["b"].fetched.read_bytes() == data[:1000]

    remote.break_after = [2000, *[0] * 5]
    with pytest.raises(SourceError, match="cannot be reached"):
        locate(parse("hf:org/tiny:c.gguf"), home, NoProgress(), client=client(remote))
    assert (set(by_name(home)), unfinished(home)) == ({"a", "b"}, [("hf:org/tiny", 2000)])
    assert remove(["hf:org/tiny:c.gguf"], home) == [("c", 2000)]
    assert (set(by_name(home)), unfinished(home)) == ({"a", "b"}, [])

    freed = dict(remove(["a", "b"], home))
    assert freed["a"] >= model.nbytes + len(data)
    assert files(home) == set()


def test_folders_that_were_converted_for_vllm(home: Path, tmp_path: Path) -> None:
    checkpoint = TinyLlama().write(tmp_path / "mine.gguf")
    folder = describe_model(str(checkpoint), home=home).folder
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert installed(home) == [
        InstalledModel("mine", format="safetensors", converted=folder, nbytes=size, kind="decoder")
    ]
    packed = load_model(str(checkpoint), home=home)  # for our own engine
    packed.close()
    (model,) = installed(home)
    assert (model.source, model.format, model.converted, model.path) == (
        str(checkpoint),
        "Q4_1 GGUF",
        folder,
        packed.path,
    )
    assert model.nbytes == size + packed.nbytes
    killed = folder.with_name(f"{folder.name}.7.tmp")
    killed.mkdir()
    (killed / "config.json").write_bytes(b"{}")
    other = folder.with_name("of-somebody-else")
    other.mkdir()
    assert len(installed(home)) == 1
    assert remove(["mine"], home) == [("mine", size + packed.nbytes + 2)]
    assert (installed(home), list(folder.parent.iterdir())) == ([], [other])
    assert checkpoint.exists()


@pytest.mark.parametrize("by", ["name", "folder", "source"])
def test_a_converted_folder_alone_can_be_removed(home: Path, tmp_path: Path, by: str) -> None:
    checkpoint = TinyLlama().write(tmp_path / "mine.gguf")
    folder = describe_model(str(checkpoint), home=home).folder
    wanted = {"name": "mine", "folder": str(folder), "source": str(checkpoint)}[by]
    assert [name for name, freed in remove([wanted], home) if freed] == ["mine"]
    assert not folder.exists()


def test_what_others_are_writing_stays(home: Path) -> None:
    packed, models = home / "packed", home / "models"
    (models / ".x-1.fetching").mkdir(parents=True)
    packed.mkdir()
    for name in ("a-0123456789abcdef.seraph.7.tmp", "a-0123456789abcdef-int8.seraph.8.tmp", "others.tmp"):
        (packed / name).touch()
    with lock(packed / "a-0123456789abcdef.lock", "testing"), lock(models / "x-1.lock", "testing"):
        sweep(home)
    assert len(files(home)) == 3
    assert (models / ".x-1.fetching").exists()
    sweep(home)
    assert files(home) == {"packed/others.tmp"}
    assert not (models / ".x-1.fetching").exists()


def test_what_cannot_be_cleared_is_left(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(str(TinyLlama().write(tmp_path / "mine.gguf")), home=home)
    (home / "packed/a-0123456789abcdef.seraph.7.tmp").touch()
    (home / "packed/a-0123456789abcdef.lock").mkdir()  # as good as a folder that is not writable
    (home / "models/.x-1.fetching").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        sweep(home)
    assert any("left as it is: clearing " in record.message for record in caplog.records)
    assert list(by_name(home)) == ["mine"]
    assert not (home / "models/.x-1.fetching").exists()
