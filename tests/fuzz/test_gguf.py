"""GGUF: the header, and everything from there to a packed file."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from engine.weights.gguf import GgufFile
from tests.fuzz.harness import fuzz, ours, peak_bytes
from tests.fuzz.strategies import Gguf, damaged, rearranged, tiny

BYTES_PER_BYTE = 60
"""Memory that reading a header may take, per byte of the file: an empty string takes 8 bytes there and 49 here."""

FILE = tiny().encode()


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with ours(path=path, offset=True), GgufFile(path) as file:
        for tensor in file.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(data)
            assert file.read_rows(tensor, 0, 1).nbytes == tensor.row_bytes


@fuzz(300, data=damaged(FILE))
def test_damaged_headers(folder: Path, data: bytes) -> None:
    read(folder / "damaged.gguf", data)


@fuzz(100, data=st.binary(max_size=200).map(lambda tail: FILE.data[:24] + tail) | st.binary(max_size=64))
def test_noise(folder: Path, data: bytes) -> None:
    read(folder / "noise.gguf", data)


@fuzz(60, data=damaged(FILE))
def test_memory_of_damaged_headers(folder: Path, data: bytes) -> None:
    path = folder / "damaged.gguf"
    assert peak_bytes(lambda: read(path, data)) < (1 << 20) + BYTES_PER_BYTE * len(data)


@fuzz(150, made=rearranged())
def test_well_formed_files_that_say_something_else(folder: Path, made: Gguf) -> None:
    read(folder / "other.gguf", made.encode().data)
