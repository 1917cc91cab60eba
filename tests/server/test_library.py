"""seraph pull, convert, models and rm."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engine.config import DEFAULT_MODEL
from engine.weights import catalog
from engine.weights.described import describe_model
from server.cli import app
from server.doctor.models import examine, examine_cache
from tests.engine.weights.wheels import client_settings, write_wheel
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return str(TinyLlama(quant="BF16").write(tmp_path / "tiny.gguf"))


def seraph(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"SERAPH_HOME": str(home), "COLUMNS": "200"})


def listed(home: Path) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in json.loads(seraph(home, "models", "--json").stdout)}


def test_an_empty_cache_lists_the_catalogue(home: Path) -> None:
    entries = catalog()
    result = seraph(home, "models")
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["NAME", "KIND", "SIZE", "FORMAT", "STATE", "WHERE"]
    assert [row.split()[0] for row in rows] == [entry.name for entry in entries]
    assert all("can be pulled" in row for row in rows)
    words = {row.split()[0]: row.split()[1:6] for row in rows}
    assert words["smollm2-135m-instruct"] == ["decoder", "98", "MB", "Q4_1", "GGUF"]
    assert words["all-minilm-l6-v2"] == ["encoder", "91", "MB", "F32", "safetensors"]
    assert listed(home) == {
        entry.name: {
            "name": entry.name,
            "kind": entry.kind,
            "bytes": entry.nbytes,
            "format": entry.format,
            "quantizations": [],
            "state": "can be pulled",
            "source": f"pypi:{entry.distribution}=={entry.version}/{entry.member}",
            "commit": "",
            "path": "",
            "description": entry.description,
        }
        for entry in entries
    }
    assert not home.exists()


def test_pull_list_remove(home: Path, checkpoint: str) -> None:
    pulled = [seraph(home, "pull", checkpoint, *more) for more in ((), ("--quantization", "int8"))]
    assert [result.exit_code for result in pulled] == [0, 0]
    assert pulled[0].stdout.startswith("tiny is installed (")
    row = listed(home)["tiny"]
    assert (row["state"], row["format"], row["quantizations"]) == ("ready", "BF16 GGUF", ["int8"])
    assert row["kind"] == "decoder"
    assert row["source"] == checkpoint
    assert Path(str(row["path"])).is_file()
    assert "BF16 GGUF as int8" in seraph(home, "models").stdout
    removed = seraph(home, "rm", "tiny")
    assert (removed.exit_code, removed.stdout.split()[:3]) == (0, ["tiny", "is", "removed:"])
    assert list(listed(home)) == [entry.name for entry in catalog()]
    assert Path(checkpoint).exists()


def test_a_model_that_vllm_was_given(home: Path, checkpoint: str) -> None:
    folder = describe_model(checkpoint, home=home).folder
    row = listed(home)["tiny"]
    assert (row["state"], row["kind"], row["path"]) == ("converted", "decoder", str(folder))
    assert row["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert [finding.detail for finding in examine(home=home)] == [f"converted for vLLM: {folder}"]
    assert seraph(home, "rm", "tiny").exit_code == 0
    assert not folder.exists()


def test_convert(home: Path, checkpoint: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    made = seraph(home, "convert", checkpoint, str(folder), "--dtype", "float32")
    assert (made.exit_code, made.stdout.split()[:3]) == (0, [checkpoint, "is", "converted"])
    assert "Converting tiny" in made.stderr
    assert seraph(home, "pull", str(folder)).stdout.startswith("made is installed (")
    again = seraph(home, "convert", checkpoint, str(folder))
    assert again.exit_code == 2
    assert "error: " + str(folder) + " exists already" in again.stderr
    assert seraph(home, "convert", checkpoint, str(folder), "--force").exit_code == 0
    assert seraph(home, "convert", str(folder), str(tmp_path / "other")).exit_code == 2


def test_a_folder_in_a_wheel(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    folder = TinyFolder().write(tmp_path / "tiny")
    files = {f"tiny_model/tiny/{path.name}": path.read_bytes() for path in folder.iterdir()}
    write_wheel(tmp_path / "wheels", {**files, "tiny_model/bert/config.json": b'{"model_type": "bert"}'})
    for key, value in client_settings(tmp_path / "wheels").items():
        monkeypatch.setenv(key, value)
    source = "pypi:tiny-model==1.0/tiny_model/tiny"
    pulled = seraph(home, "pull", source, "--quantization", "int8")
    assert (pulled.exit_code, pulled.stdout.split()[:3]) == (0, ["tiny", "is", "installed"])
    row = listed(home)["tiny"]
    assert (row["source"], row["state"], row["format"]) == (source, "ready", "BF16 safetensors")
    assert (row["kind"], row["quantizations"]) == ("decoder", ["int8"])
    for name in ("tiny", source):
        (finding,) = examine((name,), deep=True, home=home)
        assert "to the last bit" in finding.detail
    stray = home / "models/tiny-model-1.0/stray"
    stray.write_bytes(bytes(2_000_000))
    assert f"2 MB: {stray}" in next(one.detail for one in examine_cache(home) if one.subject == "leftovers")
    seraph(home, "models")
    assert not stray.exists()
    Path(str(row["path"])).unlink()
    row = listed(home)["tiny"]
    assert (row["state"], row["format"], row["kind"]) == ("fetched", "safetensors", "")
    assert row["path"] == str(home / "models/tiny-model-1.0/tiny_model/tiny")
    assert re.search(r"^tiny +\? +", seraph(home, "models").stdout, re.MULTILINE)
    assert "tiny is removed" in seraph(home, "rm", "tiny").stdout
    assert {path.suffix for path in home.rglob("*") if path.is_file()} == {".lock"}
    unknown = seraph(home, "pull", "pypi:tiny-model==1.0/tiny_model/bert")
    assert "its models are: tiny_model/tiny." in unknown.stderr.replace("\n", " ")


def test_what_was_fetched_in_part_is_told(home: Path) -> None:
    blobs = home / "hub/org--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"sha256-{'0' * 64}.part").write_bytes(bytes(2_000_000))
    assert "2 MB of unfinished fetches from hf:org/name" in seraph(home, "models").stdout
    assert list(listed(home)) == [entry.name for entry in catalog()]
    assert "name is removed: 2 MB are free again" in seraph(home, "rm", "hf:org/name").stdout
    assert "unfinished" not in seraph(home, "models").stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("rm", "gpt-5"), 1, "error: 'gpt-5' is not in the cache. There is: nothing."),
        (("pull", "gpt-5"), 1, "error: unknown model 'gpt-5'"),
        (
            ("pull", "x.gguf", "--quantization", "q4"),
            2,
            "error: quantization must be one of none, int8, int4, got 'q4'",
        ),
        (
            ("convert", "x.gguf", "y", "--dtype", "int8"),
            2,
            "error: dtype must be one of bfloat16, float16, float32, got 'int8'",
        ),
        (("convert", "x.gguf", "y"), 1, "error: x.gguf does not exist."),
        (("convert", "x.gguf"), 2, "Missing argument 'FOLDER'"),
        (("pull",), 2, "Missing argument 'SOURCE...'"),
        (("rm",), 2, "Missing argument 'NAME...'"),
    ],
)
def test_mistakes(home: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    result = seraph(home, *arguments)
    assert result.exit_code == status
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("typed", "offered"), [("seraph rm ti", ["tiny"]), ("seraph pull smol", [DEFAULT_MODEL]), ("seraph rm smol", [])]
)
def test_names_are_completed_by_the_shell(home: Path, checkpoint: str, typed: str, offered: list[str]) -> None:
    seraph(home, "pull", checkpoint)
    words = typed.split()
    shell = {"_SERAPH_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    result = CliRunner().invoke(app, [], prog_name="seraph", env={"SERAPH_HOME": str(home), **shell})
    assert result.stdout.split() == offered
