"""Wheels: archives from a registry where anybody can publish, of which one file or one folder is unpacked."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st

from engine.errors import SourceError
from engine.weights import pypi_archive
from engine.weights.folder import INDEX as WEIGHTS_INDEX
from engine.weights.folder import TEXT_FILES
from engine.weights.folder_choice import is_weights
from engine.weights.progress import NoProgress
from engine.weights.wheel import WheelFile, WheelFolder
from tests.fuzz.harness import fuzz, ours, peak_bytes
from tests.fuzz.strategies import Mark, Sample, damaged

MEMBER = "tiny_model/weights.gguf"
DATA = bytes(range(256)) * 64
WANTED = WheelFile(distribution="tiny-model", version="1.0", member=MEMBER)

FOLDER = WheelFolder(distribution="tiny-model", version="1.0", member="tiny_model/model")
INDEX = b'{"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}'
FILES = {
    "config.json": b"{}",
    "1_Pooling/config.json": b"[]",
    "a.safetensors": DATA,
    "b.safetensors": DATA,
    "model.safetensors.index.json": INDEX,
}


def pack(files: Iterable[tuple[str, bytes]], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return buffer.getvalue()


@cache
def sample(method: int) -> Sample:
    return marked(pack([("tiny_model/other.gguf", b"other"), (MEMBER, DATA)], method))


@cache
def folder_sample(method: int) -> Sample:
    return marked(pack([(f"{FOLDER.member}/{name}", data) for name, data in FILES.items()], method))


def marked(data: bytes) -> Sample:
    """A wheel, and the numbers in its records."""
    marks: list[Mark] = []
    for signature, fields in (
        (
            b"PK\3\4",
            ((4, "version"), (6, "flags and method"), (14, "checksum"), (18, "packed"), (22, "size"), (26, "names")),
        ),
        (
            b"PK\1\2",
            ((8, "flags and method"), (16, "checksum"), (20, "packed"), (24, "size"), (28, "names"), (42, "offset")),
        ),
        (b"PK\5\6", ((8, "entries"), (12, "directory size"), (16, "directory offset"))),
    ):
        at = data.find(signature)
        while at >= 0:
            marks += [Mark(at + offset, 4, what) for offset, what in fields if at + offset + 4 <= len(data)]
            at = data.find(signature, at + 1)
    return Sample(data, tuple(marks))


def unpack(folder: Path, data: bytes) -> None:
    wheel, target = folder / "w.whl", folder / "member"
    wheel.write_bytes(data)
    with ours():
        pypi_archive.unpack_file(WANTED, wheel, target, NoProgress())
        assert target.stat().st_size <= pypi_archive.MAX_EXPANSION * len(data) + pypi_archive.MIN_EXPANDED
    target.unlink(missing_ok=True)  # the caller removes the folder that it lies in
    assert {path.name for path in folder.iterdir()} == {"w.whl"}


def unpack_folder(folder: Path, data: bytes) -> None:
    wheel, target = folder / "w.whl", folder / "target"
    wheel.write_bytes(data)
    with ours():
        sizes = pypi_archive.unpack_folder(FOLDER, wheel, target, NoProgress())
        assert sum(sizes.values()) <= pypi_archive.MAX_EXPANSION * len(data) + pypi_archive.MIN_EXPANDED
        found = {str(path.relative_to(target)): path for path in target.rglob("*") if not path.is_dir()}
        assert {name: path.stat().st_size for name, path in found.items()} == sizes
        assert not any(path.is_symlink() for path in found.values())
        assert all(name in TEXT_FILES or name == WEIGHTS_INDEX or is_weights(name) for name in sizes)
    shutil.rmtree(target, ignore_errors=True)
    assert {path.name for path in folder.iterdir()} == {"w.whl"}


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@fuzz(150, method=st.sampled_from(METHODS), data=st.data())
def test_damaged_wheels(folder: Path, method: int, data: st.DataObject) -> None:
    unpack(folder, data.draw(damaged(sample(method))))


@fuzz(50, method=st.sampled_from(METHODS), data=st.data())
def test_memory_of_damaged_wheels(folder: Path, method: int, data: st.DataObject) -> None:
    wheel = data.draw(damaged(sample(method)))
    assert peak_bytes(lambda: unpack(folder, wheel)) < (16 << 20)


@fuzz(150, method=st.sampled_from(METHODS), data=st.data())
def test_damaged_wheels_with_a_folder(folder: Path, method: int, data: st.DataObject) -> None:
    unpack_folder(folder, data.draw(damaged(folder_sample(method))))


@fuzz(50, method=st.sampled_from(METHODS), data=st.data())
def test_memory_of_damaged_wheels_with_a_folder(folder: Path, method: int, data: st.DataObject) -> None:
    wheel = data.draw(damaged(folder_sample(method)))
    assert peak_bytes(lambda: unpack_folder(folder, wheel)) < (16 << 20)


ODD_NAMES = ["..", ".", "", "/", "a/../b", "\\", "\n", "\x1b[2J", "1_Pooling", "é" * 130, "x" * 300, *FILES]


@fuzz(
    150,
    parts=st.lists(st.lists(st.sampled_from([*ODD_NAMES, "model", "tiny_model"]), min_size=1, max_size=4), max_size=5),
    named=st.lists(st.sampled_from([*ODD_NAMES, "c.safetensors"]), max_size=3),
    whole=st.booleans(),
)
def test_names_in_wheels_and_indices(folder: Path, parts: list[list[str]], named: list[str], whole: bool) -> None:
    """Whatever an archive's files are called and an index names, what is unpacked lies in the folder."""
    below = [FOLDER.member + "/" + "/".join(one) + suffix for one in parts for suffix in ("", ".safetensors")]
    index = json.dumps({"weight_map": {str(i): name for i, name in enumerate(named)}}).encode()
    files = dict.fromkeys(below, b"x")
    files |= {f"{FOLDER.member}/{name}": data for name, data in FILES.items() if whole}
    files |= {f"{FOLDER.member}/model.safetensors.index.json": index} if named else {}
    unpack_folder(folder, pack(files.items(), zipfile.ZIP_STORED))


def test_files_that_are_a_bomb_together_are_refused(tmp_path: Path) -> None:
    """Each of them alone might be weights that hardly need room."""
    zeros = bytes(40 << 20)
    files = {**FILES, "a.safetensors": zeros, "b.safetensors": zeros}
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(pack([(f"{FOLDER.member}/{name}", data) for name, data in files.items()], zipfile.ZIP_DEFLATED))
    with pytest.raises(
        SourceError, match=r"up to .*/b\.safetensors, unpacks to 838861\d\d bytes, a wheel of \d+ bytes"
    ):
        pypi_archive.unpack_folder(FOLDER, wheel, tmp_path / "target", NoProgress())
    assert {path.name for path in tmp_path.iterdir()} == {"w.whl"}


def test_a_file_that_is_shorter_than_it_says_is_not_whole(tmp_path: Path) -> None:
    data = bytearray(sample(zipfile.ZIP_STORED).data)
    at = data.rfind(b"PK\1\2") + 24
    struct.pack_into("<I", data, at, len(DATA) + 1)
    (tmp_path / "w.whl").write_bytes(data)
    with pytest.raises(SourceError, match=f"is not whole: expected {len(DATA) + 1} bytes, the wheel has {len(DATA)}"):
        pypi_archive.unpack_file(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())


def bomb(size: int, claimed: int | None = None) -> bytes:
    """A wheel whose file is `size` zeros, and says that it is `claimed`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(MEMBER, "w") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    data = bytearray(buffer.getvalue())
    if claimed is not None:
        for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
            struct.pack_into("<I", data, data.find(signature) + offset, claimed)
    return bytes(data)


def test_a_file_that_unpacks_to_a_thousand_times_the_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(bomb(256 << 20))
    with pytest.raises(SourceError, match=r"unpacks to 268435456 bytes, a wheel of \d+ bytes may hold \d+"):
        pypi_archive.unpack_file(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())
    assert {path.name for path in tmp_path.iterdir()} == {"w.whl"}


def test_a_file_that_is_longer_than_it_says_is_not_written_out(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(bomb(256 << 20, claimed=1 << 20))
    with pytest.raises(SourceError, match="not a usable wheel"):
        pypi_archive.unpack_file(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())
    assert (tmp_path / "member").stat().st_size <= 1 << 20


def test_names_of_other_files_are_quoted_and_cut(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        for i in range(20):
            archive.writestr(f"{i}\n\x1b[2J" + "x" * 5000 + ".gguf", b"")
    with pytest.raises(SourceError, match="holds no") as caught:
        pypi_archive.unpack_file(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_choose_their_own_memory_are_refused(tmp_path: Path, method: int) -> None:
    (tmp_path / "w.whl").write_bytes(sample(method).data)
    with pytest.raises(SourceError, match=f"is compressed by method {method}, only stored and deflated files are read"):
        pypi_archive.unpack_file(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())


@pytest.mark.parametrize("shift", [57, 1000, 1 << 30])
def test_a_file_that_begins_before_its_wheel(tmp_path: Path, shift: int) -> None:
    """A directory that says to lie later than it does moves every file by the difference, for zipfile."""
    data = bytearray(sample(zipfile.ZIP_STORED).data)
    at = data.rfind(b"PK\5\6") + 16
    struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] + shift)
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(data)
    with pytest.raises(SourceError, match=rf"is said to begin at byte -{shift - 56}, the file has {len(data)}\."):
        pypi_archive.unpack_file(WANTED, wheel, tmp_path / "member", NoProgress())
