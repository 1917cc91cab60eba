"""Reading safetensors, a format we do not trust: the header is checked against the file's size before it is used.

The `safetensors` package reads through numpy, which has no bfloat16, so the header is read here and rows come as raw
bytes. Source: the safetensors format description (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, SourceError

MAX_HEADER_BYTES = 100 << 20
"""The format's own limit."""

MAX_DIMS = 8

_ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one value of each type of the format; which of them we load, `tensor_types` says."""

_LENGTH = struct.Struct("<Q")
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]  # from the end of the header


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Where one tensor lies. Its bytes were checked to be inside the file and to overlap no other tensor's."""

    name: str
    shape: tuple[int, ...]  # outermost first: (outputs, inputs)
    type_name: str
    offset: int  # from the start of the file
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] * _ITEM_BYTES[self.type_name]


class SafetensorsFile:
    """A safetensors file whose header was read and checked.

    Raises SourceError where the file cannot be opened, FormatError (path, offset, expected and found) where it is
    malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: io.BufferedReader = path.open("rb")
        except OSError as error:
            raise SourceError(f"cannot open {path}: {error.strerror}.") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.tensors: Mapping[str, SafeTensor] = _read_header(self._file, path, self.size)
        except BaseException:
            self._file.close()
            raise

    def read_rows(self, tensor: SafeTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """The raw bytes of rows [start, stop) of a tensor (a vector is one row), uint8 [rows, row bytes]."""
        assert 0 <= start <= stop <= math.prod(tensor.shape[:-1]), (tensor, start, stop)
        raw = np.empty((stop - start, tensor.row_bytes), np.uint8)
        offset = tensor.offset + start * tensor.row_bytes
        self._file.seek(offset)
        got = self._file.readinto(raw.reshape(-1).data)
        if got != raw.nbytes:
            raise FormatError(
                f"tensor {tensor.name}: expected {raw.nbytes} bytes, got {got}: the file shrank while it was read",
                path=self.path,
                offset=offset,
            )
        return raw

    def close(self) -> None:
        self._file.close()


def _read_header(file: io.BufferedReader, path: Path, size: int) -> dict[str, SafeTensor]:
    def error(message: str, offset: int = _LENGTH.size) -> FormatError:
        return FormatError(message, path=path, offset=offset)

    if size < _LENGTH.size:
        raise error(f"expected a header length of {_LENGTH.size} bytes, the file has {size}", 0)
    (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
    limit = min(size - _LENGTH.size, MAX_HEADER_BYTES)
    if length > limit:
        raise error(f"expected a header of at most {limit} bytes, found {length}", 0)
    raw = file.read(length)
    if len(raw) != length:
        raise error(f"expected {length} bytes of header, got {len(raw)}: the file shrank while it was read")
    try:
        table = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        table.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in table.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise error(f"the header cannot be decoded: {problem}") from None

    start = _LENGTH.size + length
    tensors: dict[str, SafeTensor] = {}
    for name, entry in entries.items():
        item = _ITEM_BYTES.get(entry.dtype)
        if item is None:
            raise error(f"tensor {name!r}: unknown type {entry.dtype!r}"[:300])
        if not len(entry.shape) <= MAX_DIMS:
            raise error(f"tensor {name!r}: expected at most {MAX_DIMS} dimensions, found {len(entry.shape)}")
        begin, end = entry.data_offsets
        nbytes = math.prod(entry.shape) * item
        if end - begin != nbytes:
            raise error(
                f"tensor {name!r} {entry.shape} {entry.dtype}: expected {nbytes} bytes, found data_offsets "
                f"[{begin}, {end}]"
            )
        if start + end > size:
            raise error(
                f"tensor {name!r} lies at bytes {start + begin} to {start + end}, but the file has {size} bytes: it is "
                "truncated or damaged"
            )
        if entry.shape and nbytes:  # a scalar or an empty tensor is part of no model that we load
            tensors[name] = SafeTensor(name, tuple(entry.shape), entry.dtype, start + begin, nbytes)
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise error(f"tensor {tensor.name!r} overlaps the one before it: expected from byte {end}, found "
                        f"{tensor.offset}")  # fmt: skip
        end = tensor.offset + tensor.nbytes
    return tensors
