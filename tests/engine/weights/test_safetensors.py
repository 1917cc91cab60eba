from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engine.errors import FormatError, SourceError
from engine.weights.safetensors import SafetensorsFile
from engine.weights.strict_json import MAX_JSON_BYTES
from tests.tiny_hf import encode, write_safetensors


def entry(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def built(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header and data; `length` is what it claims of its header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


def test_reads_what_the_library_writes(path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[str, NDArray[Any]]] = {
        f"{kind} {shape}": (kind, rng.standard_normal(shape).astype(np.float32))
        for kind in ("F32", "F16", "BF16")
        for shape in [(5,), (3, 4), (2, 3, 4), (1, 1)]
    }
    tensors["bytes"] = ("U8", np.arange(256, dtype=np.uint8).reshape(4, 64))
    tensors["scalar"] = ("F32", np.array(2.5, np.float32))
    tensors["empty"] = ("F32", np.empty((0, 4), np.float32))
    write_safetensors(path, tensors)
    file = SafetensorsFile(path)
    assert file.tensors.keys() == tensors.keys()
    for name, (kind, values) in tensors.items():
        tensor = file.tensors[name]
        assert (tensor.name, tensor.shape, tensor.type_name) == (name, values.shape, kind)
        stored = encode(values, kind)
        assert tensor.nbytes == stored.nbytes
        assert file.read_rows(tensor, 0, tensor.num_rows).tobytes() == stored.tobytes()
        if values.ndim == 2 and len(values):
            np.testing.assert_array_equal(file.read_rows(tensor, 1, 1).shape, (0, tensor.row_bytes))
            assert file.read_rows(tensor, 0, 1).tobytes() == stored[0].tobytes()
    file.close()
    file.close()


def test_metadata_and_whitespace_are_not_tensors(path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt", "x": "1"}, "a": entry()}).encode() + b"   "
    with closing(SafetensorsFile(built(path, header, bytes(24)))) as file:
        assert file.tensors.keys() == {"a"}


def test_tensors_lie_in_any_order(path: Path) -> None:
    header = {"b": entry("U8", [4], [3, 7]), "none": entry("U8", [0], [3, 3]), "a": entry("U8", [3], [0, 3])}
    with closing(SafetensorsFile(built(path, header, b"aaabbbb"))) as file:
        assert file.read_rows(file.tensors["b"], 0, 1).tobytes() == b"bbbb"
        assert file.read_rows(file.tensors["a"], 0, 1).tobytes() == b"aaa"
        assert file.tensors["none"].nbytes == 0


NESTED = b'{"a":' + b"[" * 500_000

BAD_HEADERS: list[tuple[Any, bytes, int, str]] = [
    # header, data, the offset that is named, message
    (b"[1]", b"", 8, "expected a JSON object, found list"),
    (b"", b"", 8, "expected JSON: Expecting value"),
    (b'{"a": 1,}', b"", 8 + 8, "expected JSON: Expecting property name"),
    ('{"\u00e9": 1'.encode() + b"}}", b"", 8 + 9, "expected JSON: Extra data"),
    (b'{"\xff": 1}', b"", 8 + 2, "expected UTF-8"),
    (NESTED, b"", 8, "nested too deep"),
    (b'{"a": ' + b"9" * 5000 + b"}", b"", 8, "expected JSON: Exceeds the limit"),
    (b'{"a": {"dtype": "F32", "shape": NaN}}', b"", 8, "tensor 'a'"),
    ({"a": 1}, b"", 8, "tensor 'a': Expected `object`, got `int`"),
    ({"a": None}, b"", 8, "tensor 'a': Expected `object`, got `null`"),
    ({"a": {"dtype": "F32", "shape": [1]}}, b"", 8, "tensor 'a': Object missing required field `data_offsets`"),
    ({"a": entry(extra=1)}, bytes(24), 8, "tensor 'a': Object contains unknown field `extra`"),
    ({"a": entry(dtype=3)}, bytes(24), 8, "tensor 'a': Expected `str`, got `int`"),
    ({"a": entry("F31")}, bytes(24), 8, "tensor 'a': expected one of the types BOOL, .*, found 'F31'"),
    ({"a": entry(shape=6)}, bytes(24), 8, "tensor 'a': Expected `array`, got `int`"),
    ({"a": entry(shape=[-2, -3])}, bytes(24), 8, "tensor 'a': Expected `int` >= 0"),
    ({"a": entry(shape=[2.5, 3])}, bytes(24), 8, "tensor 'a': Expected `int`, got `float`"),
    ({"a": entry(shape=[True, 6])}, bytes(24), 8, "tensor 'a': Expected `int`, got `bool`"),
    ({"a": entry(shape=[1] * 9, offsets=[0, 4])}, bytes(4), 8, "at most 8 dimensions, found 9"),
    ({"a": entry(shape=[2**53] * 8)}, bytes(24), 8, r"takes \d{120,} bytes, found data_offsets \[0, 24\]"),
    ({"a": entry(shape=[2**54])}, bytes(24), 8, "tensor 'a': Expected `int` <= 9007199254740992"),
    ({"a": entry(offsets=[0, 23])}, bytes(24), 8, r"F32 \[2, 3\] takes 24 bytes, found data_offsets \[0, 23\]"),
    ({"a": entry(offsets=[24, 0])}, bytes(24), 8, r"takes 24 bytes, found data_offsets \[24, 0\]"),
    ({"a": entry(offsets=[0])}, bytes(24), 8, "tensor 'a': Expected `array` of length 2"),
    ({"a": entry(offsets=[-24, 0])}, bytes(24), 8, "tensor 'a': Expected `int` >= 0"),
    ({"a": entry()}, bytes(23), 8, "lies at bytes 73 to 97, but the file has 96 bytes: it is truncated or damaged"),
    ({"a": entry("F64", [2**50], [0, 2**53])}, b"", 8, "it is truncated or damaged"),
    ({"a": entry(), "b": entry(offsets=[20, 44])}, bytes(44), 8, "'b' overlaps .*: expected from byte 163, found 159"),
    ({"a": entry(), "b": entry()}, bytes(48), 8, "'b' overlaps the one before it"),
    ({"a": entry(), "b": entry(offsets=[28, 52])}, bytes(52), 8, "'b' leaves a gap before it: .* 163, found 167"),
    ({"a": entry(offsets=[1, 25])}, bytes(25), 8, "'a' leaves a gap before it"),
    ({"a": entry()}, bytes(25), 97, "expected the file to end with its last tensor at 97, it has 98 bytes"),
    (b'{"a": {}, "b": {}, "a": {}}', b"", 8, "the key 'a' is given twice"),
    (b'{"a": {"dtype": "U8", "shape": [1], "shape": [2], "data_offsets": [0, 2]}}', b"12", 8, "'shape' is given twice"),
]


@pytest.mark.parametrize(("header", "data", "offset", "message"), BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_bad_headers_are_refused_where_they_go_wrong(
    path: Path, header: Mapping[str, Any] | bytes, data: bytes, offset: int, message: str
) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError, match=f"^{re.escape(str(path))} at byte {offset}: ") as caught:
        SafetensorsFile(built(path, header, data))
    assert re.search(message, str(caught.value)), caught.value
    assert (caught.value.path, caught.value.offset) == (path, offset)
    assert len(str(caught.value)) < 1000
    assert len(os.listdir("/proc/self/fd")) == open_before


@pytest.mark.parametrize("size", range(8))
def test_a_file_without_a_whole_header_length(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with pytest.raises(FormatError, match=f"at byte 0: expected a header length of 8 bytes, the file has {size}"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", [3, 2**31, 2**63, 2**64 - 1])
def test_a_claim_of_a_longer_header_than_the_file_reads_nothing(path: Path, length: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=f"at byte 0: expected a header of at most 2 bytes, found {length}"):
            SafetensorsFile(built(path, b"{}", length=length))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_that_is_too_long_for_any_model_is_not_read(path: Path) -> None:
    with path.open("wb") as file:  # sparse
        file.write(struct.pack("<Q", MAX_JSON_BYTES + 1))
        file.truncate(8 + MAX_JSON_BYTES + 1)
    with pytest.raises(FormatError, match=f"expected a header of at most {MAX_JSON_BYTES} bytes"):
        SafetensorsFile(path)


def test_a_header_takes_bounded_memory(path: Path) -> None:
    """Objects of no use, as small as they come: parsed, and refused, within a few dozen bytes for each of the file.
    MAX_JSON_BYTES is what keeps that small."""
    raw = b"{" + b",".join(b'"%05x":{}' % i for i in range(50_000)) + b"}"
    built(path, raw)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="tensor '00000': Object missing required field `dtype`"):
            SafetensorsFile(path)
        assert tracemalloc.get_traced_memory()[1] < 50 * len(raw)
    finally:
        tracemalloc.stop()


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot open .*none\.safetensors: No such file or directory"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match="it is not a file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(SourceError, match="it is not a file"):
        SafetensorsFile(tmp_path / "pipe.safetensors")


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    file = SafetensorsFile(built(path, {"a": entry("U8", [64, 1024], [0, 65536])}, bytes(65536)))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match="tensor a: expected 2048 bytes, got 2047: the file shrank"):
        file.read_rows(file.tensors["a"], 62, 64)
    file.close()


def test_we_accept_no_layout_that_the_library_refuses(path: Path) -> None:
    """Of each bad header above that is a layout and not a matter of keys, the library says the same."""
    for header, data, _, message in BAD_HEADERS:
        if isinstance(header, dict) and re.search("overlaps|gap|truncated|end with", message):
            built(path, header, data)
            with pytest.raises(SafetensorError), safe_open(path, framework="np"):
                pass
