"""safetensors: reading a format we do not trust, whose header is checked against the file's size before it is used; and
the header of a file of our own.

The `safetensors` package reads through numpy, which has no bfloat16, so the header is read here and rows come as raw
bytes. Source: the safetensors format description: 8 bytes header length, a JSON header, then data that the tensors
cover without gaps and without overlapping.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, SourceError
from engine.weights.files import read_rows
from engine.weights.strict_json import MAX_JSON_BYTES, decode_object

MAX_DIMS = 8

_ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one value of each type of whole bytes; which of them we load, `tensor_types` says."""

_LENGTH = struct.Struct("<Q")
_LFS_POINTER = b"version "
"""How the text begins that a repository has where Git LFS did not fetch the file."""
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]  # begin and end, from the end of the header


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Where one tensor lies. Its bytes were checked to be inside the file and to belong to no other tensor."""

    name: str
    shape: tuple[int, ...]  # outermost first: (outputs, inputs)
    type_name: str
    offset: int  # from the start of the file
    nbytes: int

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[-1:]) * _ITEM_BYTES[self.type_name]


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """What a file begins with that holds these tensors (name, type, shape) one after another."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses a file
    end = 0
    for name, type_name, shape in tensors:
        begin, end = end, end + math.prod(shape) * _ITEM_BYTES[type_name]
        table[name] = _Entry(type_name, list(shape), (begin, end))
    encoded = msgspec.json.encode(table)
    encoded += b" " * (-len(encoded) % _LENGTH.size)  # data that is aligned can be mapped
    return _LENGTH.pack(len(encoded)) + encoded


class SafetensorsFile:
    """A safetensors file whose header was read and checked.

    Raises SourceError where the file cannot be opened, FormatError (path, offset, expected and found) where it is
    malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait forever
                raise SourceError(f"cannot open {path}: it is not a file.")
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
        assert 0 <= start <= stop <= tensor.num_rows, (tensor, start, stop)
        offset = tensor.offset + start * tensor.row_bytes
        return read_rows(self._file, self.path, tensor.name, offset, stop - start, tensor.row_bytes)

    def close(self) -> None:
        """Idempotent."""
        self._file.close()


def _read_header(file: io.BufferedReader, path: Path, size: int) -> dict[str, SafeTensor]:
    if size < _LENGTH.size:
        raise FormatError(f"expected a header length of {_LENGTH.size} bytes, the file has {size}", path=path, offset=0)
    first = file.read(_LENGTH.size)
    (length,) = _LENGTH.unpack(first)
    limit = min(size - _LENGTH.size, MAX_JSON_BYTES)
    if length > limit:
        hint = ": this is a Git LFS pointer, `git lfs pull` gets the file" if first == _LFS_POINTER else ""
        raise FormatError(f"expected a header of at most {limit} bytes, found {length}{hint}", path=path, offset=0)
    table = decode_object(file.read(length), path, offset=_LENGTH.size)
    table.pop("__metadata__", None)  # free text of whoever wrote the file
    start = _LENGTH.size + length
    tensors = [_tensor(name, entry, start, path) for name, entry in table.items()]
    _need_cover(tensors, start, size, path)
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, entry: object, start: int, path: Path) -> SafeTensor:
    """An entry of the header, checked by itself; the data begin at byte `start`."""
    shown = repr(name[:100])

    def error(message: str) -> FormatError:
        return FormatError(f"tensor {shown}: {message}", path=path, offset=_LENGTH.size)

    try:
        checked = msgspec.convert(entry, _Entry)
    except msgspec.ValidationError as problem:
        raise error(str(problem)) from None
    item = _ITEM_BYTES.get(checked.dtype)
    if item is None:
        raise error(f"expected one of the types {', '.join(_ITEM_BYTES)}, found {checked.dtype[:100]!r}")
    if len(checked.shape) > MAX_DIMS:
        raise error(f"expected at most {MAX_DIMS} dimensions, found {len(checked.shape)}")
    begin, end = checked.data_offsets
    nbytes = math.prod(checked.shape) * item
    if end - begin != nbytes:
        raise error(f"{checked.dtype} {checked.shape} takes {nbytes} bytes, found data_offsets [{begin}, {end}]")
    return SafeTensor(name, tuple(checked.shape), checked.dtype, start + begin, nbytes)


def _need_cover(tensors: list[SafeTensor], start: int, size: int, path: Path) -> None:
    """Raise FormatError unless the tensors are exactly the bytes from `start` to `size`, each byte of one tensor."""
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise FormatError(
                f"tensor {tensor.name[:100]!r} {what}: expected from byte {end}, found {tensor.offset}",
                path=path,
                offset=_LENGTH.size,
            )
        end += tensor.nbytes
        if end > size:
            raise FormatError(
                f"tensor {tensor.name[:100]!r} lies at bytes {tensor.offset} to {end}, but the file has {size} bytes: "
                "it is truncated or damaged",
                path=path,
                offset=_LENGTH.size,
            )
    if end != size:
        raise FormatError(f"expected the file to end with its last tensor at {end}, it has {size} bytes",
                          path=path, offset=end)  # fmt: skip
