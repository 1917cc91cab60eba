"""Reading GGUF, a format we do not trust: everything is checked against the file's size before it is used.

The file's own counts, lengths and offsets never decide how much is allocated until the bytes they promise are known to
exist. Types, sizes and constants are the `gguf` library's. Its reader is not used: it believes the header, and builds
two arrays per string (2 s and 160 MB for a vocabulary of 49,152), where one pass with checks takes 0.2 s.

Source: the GGUF specification, versions 2 and 3.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from engine.errors import FormatError, SourceError
from engine.weights.files import read_rows

VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_HEADER_BYTES = 64 << 20
"""No real header comes near it (a vocabulary of 262,144 takes 20 MB), and it bounds what a hostile one costs us."""
MAX_ENTRIES = 1 << 16
"""Tensors, and metadata keys. An entry of the tables takes us twenty times the bytes that it has in the file."""

_SCALARS: Mapping[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<B"),
}
_U32 = _SCALARS[GGUFValueType.UINT32]
_U64 = _SCALARS[GGUFValueType.UINT64]
_MIN_KEY_BYTES = 8 + 4 + 1  # an empty key, its type, one byte of value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, the number of dimensions, one of them, type, offset


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. Its bytes were checked to be inside the file and to overlap no other tensor's."""

    name: str
    shape: tuple[int, ...]  # outermost first: (outputs, inputs)
    type: GGMLQuantizationType
    offset: int  # from the start of the file
    nbytes: int

    @property
    def type_name(self) -> str:
        return self.type.name

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size


class GgufFile:
    """A GGUF file whose header was read and checked.

    `metadata` maps keys to int, float, bool, str, list[str] or one-dimensional numpy arrays. Raises SourceError where
    the file cannot be opened, FormatError (path, offset, expected and found) where it is malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: io.BufferedReader = path.open("rb")
        except OSError as error:
            raise SourceError(f"cannot open {path}: {error.strerror}.") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            cursor = _Cursor(self._file, path, self.size)
            self.metadata, self.tensors = _read_header(cursor)
        except BaseException:
            self._file.close()
            raise

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """The raw bytes of rows [start, stop) of a tensor (a vector is one row), uint8 [rows, row bytes]."""
        num_rows = math.prod(tensor.shape[:-1])
        assert 0 <= start <= stop <= num_rows, (tensor, start, stop)
        offset = tensor.offset + start * tensor.row_bytes
        return read_rows(self._file, self.path, tensor.name, offset, stop - start, tensor.row_bytes)

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Cursor:
    """Reads forward and never past the end: what a length promises is checked before a byte of it is read."""

    def __init__(self, file: io.BufferedReader, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._end = min(size, MAX_HEADER_BYTES)
        self.size = size
        self.offset = 0

    def error(self, message: str, offset: int | None = None) -> FormatError:
        return FormatError(message, path=self._path, offset=self.offset if offset is None else offset)

    def need(self, count: int, unit: int, what: str) -> None:
        """Raise FormatError unless `count` items of at least `unit` bytes each can follow."""
        left = self._end - self.offset
        if count * unit > left:
            limit = "the file" if self._end == self.size else f"a header's {MAX_HEADER_BYTES} bytes"
            raise self.error(f"{what} needs {count * unit} bytes, only {left} are left in {limit}")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, 1, what)
        data = self._file.read(count)
        if len(data) != count:
            raise self.error(f"{what}: expected {count} bytes, got {len(data)}: the file shrank while it was read")
        self.offset += count
        return data

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def text(self, what: str) -> str:
        length = self.u64(what)
        start = self.offset
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what}: invalid UTF-8", start + error.start) from None


def _read_header(cursor: _Cursor) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    magic = cursor.take(4, "the magic")
    if _U32.unpack(magic)[0] != GGUF_MAGIC:
        raise cursor.error(f"expected the magic b'GGUF', found {magic!r}", 0)
    version = cursor.u32("the version")
    if version not in VERSIONS:
        hint = " (a big-endian file)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
        raise cursor.error(f"expected GGUF version 2 or 3, found {version}{hint}", 4)
    num_tensors = cursor.u64("the tensor count")
    num_keys = cursor.u64("the metadata count")
    cursor.need(num_keys, _MIN_KEY_BYTES, f"metadata of {num_keys} keys")
    cursor.need(num_tensors, _MIN_TENSOR_BYTES, f"a table of {num_tensors} tensors")
    if max(num_keys, num_tensors) > MAX_ENTRIES:
        raise cursor.error(f"expected at most {MAX_ENTRIES} tensors and keys, found {num_tensors} and {num_keys}", 8)

    metadata: dict[str, object] = {}
    for _ in range(num_keys):
        at = cursor.offset
        key = cursor.text("a metadata key")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} is given twice", at)
        metadata[key] = _read_value(cursor, key)

    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment must be a power of two from 8 up, found {alignment!r}")
    entries = [_read_tensor(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.offset // alignment) * alignment
    return metadata, _place_tensors(cursor, entries, data_start, alignment)


def _read_value(cursor: _Cursor, key: str) -> object:
    kind = _read_kind(cursor, key)
    if kind is GGUFValueType.STRING:
        return cursor.text(key)
    if kind is not GGUFValueType.ARRAY:
        at = cursor.offset
        scalar = _SCALARS[kind]
        value = scalar.unpack(cursor.take(scalar.size, key))[0]
        if kind is not GGUFValueType.BOOL:
            return value
        if value not in (0, 1):
            raise cursor.error(f"{key}: a bool must be 0 or 1, found {value}", at)
        return bool(value)

    item = _read_kind(cursor, key)
    count = cursor.u64(key)
    if item is GGUFValueType.ARRAY:
        raise cursor.error(f"{key}: arrays of arrays are not supported")
    if item is GGUFValueType.STRING:
        cursor.need(count, 8, f"{key}: an array of {count} strings")
        return [cursor.text(key) for _ in range(count)]
    size = _SCALARS[item].size
    cursor.need(count, size, f"{key}: an array of {count} values")
    dtype = np.dtype("?") if item is GGUFValueType.BOOL else np.dtype(_SCALARS[item].format)
    raw = cursor.take(count * size, key)
    if item is GGUFValueType.BOOL and count and max(raw) > 1:
        raise cursor.error(f"{key}: bools must be 0 or 1, found {max(raw)}")
    return np.frombuffer(raw, dtype)


def _read_kind(cursor: _Cursor, key: str) -> GGUFValueType:
    at = cursor.offset
    value = cursor.u32(key)
    try:
        return GGUFValueType(value)
    except ValueError:
        raise cursor.error(f"{key}: unknown value type {value} (0 to 12 are known)", at) from None


def _read_tensor(cursor: _Cursor) -> tuple[int, GgufTensor]:
    """One entry of the tensor table and where it began; its offset still counts from the start of the data."""
    at = cursor.offset
    name = cursor.text("a tensor's name")
    num_dims = cursor.u32(name)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"tensor {name!r}: expected 1 to {MAX_DIMS} dimensions, found {num_dims}", at)
    # GGUF lists the innermost dimension first.
    shape = tuple(cursor.u64(name) for _ in range(num_dims))[::-1]
    if 0 in shape:
        raise cursor.error(f"tensor {name!r}: a dimension is 0 in {list(shape)}", at)
    type_id = cursor.u32(name)
    try:
        kind = GGMLQuantizationType(type_id)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.error(f"tensor {name!r}: unknown type {type_id}", at) from None
    if shape[-1] % block:
        raise cursor.error(f"tensor {name!r}: expected rows of a multiple of {block} values, found {shape[-1]}", at)
    offset = cursor.u64(name)
    return at, GgufTensor(name, shape, kind, offset, math.prod(shape) // block * size)


def _place_tensors(
    cursor: _Cursor, entries: list[tuple[int, GgufTensor]], data_start: int, alignment: int
) -> dict[str, GgufTensor]:
    """Make offsets absolute and check that each tensor is aligned, inside the file, and apart from the others."""
    placed: dict[str, GgufTensor] = {}
    for at, tensor in entries:
        if tensor.name in placed:
            raise cursor.error(f"tensor {tensor.name!r} is given twice", at)
        if tensor.offset % alignment:
            raise cursor.error(
                f"tensor {tensor.name!r}: offset {tensor.offset} is not a multiple of the alignment {alignment}", at
            )
        start = data_start + tensor.offset
        if start + tensor.nbytes > cursor.size:
            raise cursor.error(
                f"tensor {tensor.name!r} {list(tensor.shape)} {tensor.type.name} lies at bytes {start} to "
                f"{start + tensor.nbytes}, but the file has {cursor.size} bytes: it is truncated or damaged",
                at,
            )
        placed[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.type, start, tensor.nbytes)
    in_order = sorted(placed.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            raise cursor.error(f"tensors {before.name!r} and {after.name!r} overlap", after.offset)
    return placed
