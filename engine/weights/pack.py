"""The packed file, `*.seraph`: everything a start needs, in the layout that kernels read, mapped and not parsed.

    64 bytes   magic, format version, layout version, header bytes, file bytes, SHA-256 of those and of the header
    header     msgpack: name, ModelInfo, the source it was packed from, the table of tensors
    data       from a multiple of 2 MiB (a huge page); each tensor from a multiple of 64 bytes, in the table's order

Integers are little-endian. Matrices are in the layout of `engine.kernels.layout`, vectors are float32. A file is
written beside its target and renamed, so a `*.seraph` is complete or absent; one that is not what its header says was
damaged later, and is refused with FormatError.
"""

from __future__ import annotations

import glob
import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, ModelError, SourceError
from engine.kernels.layout import LAYOUT_VERSION, MatrixFormat, PackedTensor
from engine.models.spec import DecoderSpec, EncoderSpec, ModelInfo, Spec
from engine.weights.files import free_bytes, need_space, publish, writing
from engine.weights.progress import Progress

MAGIC = b"SERAPHPK"
FORMAT_VERSION = 5
"""Raise it with every change of the above or of how weights become quants: older files are packed again."""
DATA_ALIGNMENT = 2 << 20
TENSOR_ALIGNMENT = 64
MAX_HEADER_BYTES = 256 << 20

_FIXED = struct.Struct("<8sIIQQ")  # magic, format version, layout version, header bytes, file bytes
_PREFIX_BYTES = _FIXED.size + hashlib.sha256().digest_size
assert _PREFIX_BYTES == 64


class Source(msgspec.Struct, frozen=True):
    """What a packed file was made from. `stamp` changes when the source does (empty: it never does)."""

    name: str  # of the checkpoint's file or folder
    sha256: str
    stamp: str
    origin: str = ""  # the one spelling of the source that all others come down to
    commit: str = ""  # of the repository it was fetched from
    quantization: str | None = None  # what was asked for; None: as the checkpoint stores its weights


class _Entry(msgspec.Struct, frozen=True):
    name: str
    format: MatrixFormat | None  # None: a float32 vector
    offset: int  # from the start of the file
    nbytes: int


class _Kind(msgspec.Struct, frozen=True):
    """What is read of a header first: it says what the rest is."""

    kind: Literal["decoder", "encoder"]


class _Header(msgspec.Struct, Generic[Spec], frozen=True):
    kind: str
    name: str
    info: ModelInfo[Spec]
    source: Source
    tensors: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True)
class TensorWriter:
    """One tensor to be packed: its format is known before its bytes are made, so the file's size is too.

    `chunks` yields the packed bytes in order, a few MB at a time: packing never holds a whole tensor.
    """

    name: str
    format: MatrixFormat | None
    nbytes: int
    chunks: Callable[[], Iterator[NDArray[np.generic]]]


class PackedModel(Generic[Spec]):
    """A packed file, mapped read-only and shared with every process that maps it.

    `weights` are views into the mapping, named as its spec's `tensor_shapes` names them.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        info: ModelInfo[Spec],
        source: Source,
        weights: Mapping[str, PackedTensor],
        mapping: mmap.mmap,
    ) -> None:
        self.name = name
        self.path = path
        self.info = info
        self.source = source
        self.weights = weights
        self.nbytes = len(mapping)  # of the whole file
        self._mapping: mmap.mmap | None = mapping

    def close(self) -> None:
        """Let go of the weights; the file is unmapped with the last array that still views it. Idempotent."""
        self.weights = {}
        self._mapping = None

    def copied(self) -> dict[str, PackedTensor]:
        """The weights in memory of this process alone, in huge pages where the system gives them.

        What this process held of the file is given back. Raises MemoryError where there is not enough.
        """
        sizes = [_round_up(tensor.data.nbytes, TENSOR_ALIGNMENT) for tensor in self.weights.values()]
        try:
            memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{sum(sizes)} bytes for a copy of the weights: {error.strerror}") from error
        memory.madvise(mmap.MADV_HUGEPAGE)
        copies, offset = {}, 0
        for (name, tensor), size in zip(self.weights.items(), sizes, strict=True):
            copy = np.frombuffer(memory, np.uint8, tensor.data.nbytes, offset)
            copy[:] = tensor.data.view(np.uint8)
            copy.flags.writeable = False
            copies[name] = PackedTensor(tensor.format, copy if tensor.format is not None else copy.view(np.float32))
            offset += size
        self.give_back()
        return copies

    def give_back(self) -> None:
        """Give the memory back that the mapped file takes here; what is still wanted of it is read again."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)


def write_packed(
    path: Path,
    *,
    name: str,
    info: ModelInfo[Any],
    source: Source,
    tensors: Sequence[TensorWriter],
    progress: Progress,
    free: Callable[[Path], int] = free_bytes,
) -> None:
    """Write a packed file to `path`, atomically. The caller holds the lock of `path`.

    Raises SourceError where the disk is full or not writable, and leaves nothing behind then.
    """
    entries, header, size = _lay_out(name, info, source, tensors)
    purpose = f"packing {name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever wrote these was killed: the lock that we hold was theirs.
    for leftover in path.parent.glob(glob.escape(path.name) + ".*.tmp"):
        leftover.unlink(missing_ok=True)
    need_space(path.parent, size, purpose, free=free)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    progress.start(f"Packing {name}", sum(entry.nbytes for entry in entries))
    try:
        with writing(path.parent, size, purpose), temporary.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # so that a full disk is noticed now
            file.write(_prefix(header, size) + header)
            for entry, tensor in zip(entries, tensors, strict=True):
                file.seek(entry.offset)
                for chunk in tensor.chunks():
                    file.write(chunk.data)
                    progress.advance(chunk.nbytes)
                assert file.tell() == entry.offset + entry.nbytes, tensor.name
            file.flush()
            os.fsync(file.fileno())
            publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        progress.done()


def open_packed(path: Path, *, wanted: bool = True) -> PackedModel[Any]:
    """Map a packed file. With `wanted` its weights are read ahead; without, only its header is read.

    Raises SourceError where it cannot be opened, FormatError where it is damaged or of another version.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _PREFIX_BYTES:
                raise FormatError(f"expected a packed file of at least {_PREFIX_BYTES} bytes, found {size}", path=path)
            mapping = mmap.mmap(file.fileno(), size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise SourceError(f"cannot open {path}: {error.strerror}.") from error
    try:
        header = _read_header(mapping, size, path)
    except BaseException:
        mapping.close()
        raise
    if wanted:  # whole and soon: let the kernel read ahead while the rest of the start goes on
        mapping.madvise(mmap.MADV_WILLNEED)
    weights = {entry.name: PackedTensor(entry.format, _view(mapping, entry)) for entry in header.tensors}
    return PackedModel(header.name, path, header.info, header.source, weights, mapping)


def _view(mapping: mmap.mmap, entry: _Entry) -> NDArray[np.uint8] | NDArray[np.float32]:
    raw = np.frombuffer(mapping, np.uint8, entry.nbytes, entry.offset)
    return raw if entry.format is not None else raw.view(np.float32)


def _lay_out(
    name: str, info: ModelInfo[Any], source: Source, tensors: Sequence[TensorWriter]
) -> tuple[list[_Entry], bytes, int]:
    """Place the tensors: their entries, the encoded header, the file's size."""

    def placed(data_start: int) -> Iterable[_Entry]:
        offset = data_start
        for tensor in tensors:
            yield _Entry(tensor.name, tensor.format, offset, tensor.nbytes)
            offset = _round_up(offset + tensor.nbytes, TENSOR_ALIGNMENT)

    # The offsets' own digits change the header's length, and that may move the data: settle within a few rounds.
    data_start = DATA_ALIGNMENT
    while True:
        entries = list(placed(data_start))
        kind = "encoder" if isinstance(info.spec, EncoderSpec) else "decoder"
        header = msgspec.msgpack.encode(_Header(kind, name, info, source, tuple(entries)))
        if _PREFIX_BYTES + len(header) <= data_start:
            return entries, header, entries[-1].offset + entries[-1].nbytes
        data_start = _round_up(_PREFIX_BYTES + len(header), DATA_ALIGNMENT)


def _prefix(header: bytes, size: int) -> bytes:
    fixed = _FIXED.pack(MAGIC, FORMAT_VERSION, LAYOUT_VERSION, len(header), size)
    return fixed + hashlib.sha256(fixed + header).digest()


def _read_header(mapping: mmap.mmap, size: int, path: Path) -> _Header[Any]:
    def need(ok: bool, what: str, expected: object, found: object, offset: int) -> None:
        if not ok:
            raise FormatError(f"{what}: expected {expected}, found {found}", path=path, offset=offset)

    fixed = mapping[: _FIXED.size]
    magic, version, layout, header_bytes, file_bytes = _FIXED.unpack(fixed)
    need(magic == MAGIC, "magic", MAGIC, magic, 0)
    need(version == FORMAT_VERSION, "format version", FORMAT_VERSION, version, 8)
    need(layout == LAYOUT_VERSION, "layout version", LAYOUT_VERSION, layout, 12)
    limit = min(size - _PREFIX_BYTES, MAX_HEADER_BYTES)
    need(header_bytes <= limit, "header bytes", f"at most {limit}", header_bytes, 16)
    need(file_bytes == size, "file size", file_bytes, f"{size}: the file is truncated or damaged", 24)
    header = mapping[_PREFIX_BYTES : _PREFIX_BYTES + header_bytes]
    checksum = mapping[_FIXED.size : _PREFIX_BYTES]
    actual = hashlib.sha256(fixed + header).digest()
    need(actual == checksum, "header checksum", checksum.hex(), actual.hex(), _FIXED.size)
    try:
        kind = msgspec.msgpack.decode(header, type=_Kind).kind
        decoded: _Header[Any] = msgspec.msgpack.decode(
            header, type=_Header[EncoderSpec] if kind == "encoder" else _Header[DecoderSpec]
        )
    except (msgspec.MsgspecError, ModelError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the header cannot be decoded: {error}", path=path, offset=_PREFIX_BYTES) from error
    _check_table(decoded, size, _PREFIX_BYTES + header_bytes, path)
    return decoded


def _check_table(header: _Header[Any], size: int, data_start: int, path: Path) -> None:
    """Raise FormatError unless the table holds exactly the spec's tensors, inside the file and apart."""
    spec = header.info.spec
    names = [entry.name for entry in header.tensors]
    # Counted first: the names of a spec with absurdly many layers are not worth making.
    if spec.num_layers > len(names) or names != list(spec.tensor_shapes()):
        raise FormatError(f"the table's {len(names)} tensors are not those of its {spec.num_layers} layers", path=path)
    shapes = spec.tensor_shapes()
    end = data_start
    for entry in header.tensors:
        shape, fmt = shapes[entry.name], entry.format
        found = (entry.nbytes // 4,) if fmt is None else (fmt.n, fmt.k)
        nbytes = 4 * shape[0] if fmt is None else fmt.nbytes
        if found != shape or entry.nbytes != nbytes:
            raise FormatError(
                f"tensor {entry.name}: expected shape {list(shape)}, found {list(found)} in {entry.nbytes} bytes",
                path=path,
            )
        if entry.offset < end or entry.offset % TENSOR_ALIGNMENT or entry.offset + nbytes > size:
            raise FormatError(
                f"tensor {entry.name}: expected a multiple of {TENSOR_ALIGNMENT} from {end} to {size - nbytes}, "
                f"found offset {entry.offset}",
                path=path,
            )
        end = entry.offset + nbytes


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
