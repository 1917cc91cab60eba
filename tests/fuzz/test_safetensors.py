"""Safetensors headers. What the reference library reads and we refuse, or the other way round, is told apart, too."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from engine.errors import FormatError
from engine.weights.safetensors import SafetensorsFile
from tests.fuzz.documents import changed, encoded
from tests.fuzz.harness import fuzz, ours, peak_bytes
from tests.fuzz.strategies import Mark, Sample, damaged, names

BYTES_PER_BYTE = 60
"""Memory that reading a header may take, per byte of the file: JSON's [] takes 2 bytes there and 56 here."""


@cache
def header() -> Any:
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [48, 56]},
        "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [56, 56]},
        "scalar": {"dtype": "F64", "shape": [], "data_offsets": [56, 64]},
    }


def file_of(head: bytes, data: bytes = bytes(64)) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


@cache
def sample() -> Sample:
    head = json.dumps(header()).encode()
    return Sample(file_of(head), (Mark(0, 8, "header length"),) * 3, 8 + len(head))


def read(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with ours(path=path, offset=True):
        file = SafetensorsFile(path)
        try:
            for tensor in file.tensors.values():
                assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(data)
                assert file.read_rows(tensor, 0, tensor.num_rows).nbytes == tensor.nbytes
        finally:
            file.close()


@fuzz(150, made=st.deferred(lambda: changed(header())), data=st.sampled_from([bytes(64), bytes(63), b"", bytes(4096)]))
def test_headers_that_say_something_else(folder: Path, made: Any, data: bytes) -> None:
    read(folder / "m.safetensors", file_of(encoded(made), data))


@fuzz(150, data=st.deferred(lambda: damaged(sample())))
def test_damaged_headers(folder: Path, data: bytes) -> None:
    read(folder / "m.safetensors", data)


NESTED = st.sampled_from([b"[", b'{"a":', b"[[],", b'"', b"1e999,", b"-", b"\\u0000", b"\xff", b"{}", b"0"])


@fuzz(50, unit=NESTED, count=st.integers(1, 30_000), close=st.booleans())
def test_memory_of_headers_that_repeat_themselves(folder: Path, unit: bytes, count: int, close: bool) -> None:
    data = file_of(b'{"a": ' + unit * count + (b"}" if close else b"]" * count + b"}"))
    peak = peak_bytes(lambda: read(folder / "m.safetensors", data))
    assert peak < (2 << 20) + BYTES_PER_BYTE * len(data)


@fuzz(80, made=st.deferred(lambda: changed(header())), name=names)
def test_what_we_read_is_what_the_library_reads(folder: Path, made: Any, name: str) -> None:
    """A file that both take has the same tensors at the same places; the library takes nothing that we take wrongly."""
    path = folder / "m.safetensors"
    if isinstance(made, dict):
        made = {name if key == "a" else key: value for key, value in made.items()}
    path.write_bytes(file_of(encoded(made)))
    try:
        file = SafetensorsFile(path)
    except FormatError:
        return
    try:
        with safe_open(path, framework="numpy") as theirs:
            for key in theirs.keys():  # noqa: SIM118
                part = theirs.get_slice(key)
                assert (tuple(part.get_shape()), part.get_dtype()) == (
                    file.tensors[key].shape,
                    file.tensors[key].type_name,
                )
            assert set(theirs.keys()) == set(file.tensors)
    except SafetensorError:
        pass
    finally:
        file.close()
