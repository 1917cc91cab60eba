"""Whether a packed file is what a start would want: its header, its numbers, the checkpoint it was made from.

Nothing here fetches, packs or changes anything.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, ModelError
from engine.kernels.layout import GROUP, LAYOUT_VERSION, STRIP, MatrixFormat, PackedTensor
from engine.weights import hub, pypi
from engine.weights.files import try_lock
from engine.weights.pack import FORMAT_VERSION, MAGIC, PackedModel, open_packed
from engine.weights.progress import NoProgress
from engine.weights.source import FileSource, FolderSource, HubSource, Located, WheelSource, locate, parse
from engine.weights.store import split_packed_name

SAMPLED_STRIPS = 4
"""Strips of a matrix that are looked at where not everything is to be read."""

_BLOCK_BYTES = 8 << 20


class Condition(enum.Enum):
    """What a start would do with a packed file."""

    CURRENT = "current"  # map it
    OUTDATED = "outdated"  # pack its checkpoint again, or refuse because that is gone
    DAMAGED = "damaged"  # pack its checkpoint again where it notices; compute nonsense where it cannot


@dataclass(frozen=True, slots=True)
class Examined:
    """One packed file. `said` explains the condition, in a sentence without its first capital and last point."""

    path: Path
    condition: Condition
    said: str


def check_packed(path: Path, home: Path, *, deep: bool = False) -> Examined:
    """Examine the packed file `path` of the cache folder `home`.

    Always: the header's checksum and its table, all vectors, the scales of some strips of each matrix, and whether the
    checkpoint is still the one it was made from. With `deep`: every byte is read, every scale is looked at, and what
    packing the checkpoint again would give is compared where it lies on this machine.
    """
    if (versions := _versions(path)) is not None and versions != (FORMAT_VERSION, LAYOUT_VERSION):
        return Examined(path, Condition.OUTDATED, "it was packed by another version of Seraph")
    try:
        if deep:
            _read(path)  # a disk that fails raises here; reading what is mapped, it would end the process
        model = open_packed(path, wanted=False)
    except (ModelError, OSError) as error:
        return Examined(path, Condition.DAMAGED, str(error).rstrip("."))
    try:
        return _check_open(model, home, deep=deep)
    finally:
        model.close()


def _check_open(model: PackedModel, home: Path, *, deep: bool) -> Examined:
    for name, tensor in model.weights.items():
        if (where := _not_finite(tensor, deep=deep)) is not None:
            return Examined(model.path, Condition.DAMAGED, f"tensor {name}, {where}: not every value is finite")
    try:
        checkpoint = _checkpoint(model, home)
    except ModelError as error:
        return Examined(model.path, Condition.OUTDATED, f"its checkpoint is not there: {str(error).rstrip('.')}")
    made_from = model.source.origin or model.source.name
    if checkpoint is None:
        return Examined(model.path, Condition.CURRENT, f"made from {made_from}, which is not there to compare with")
    if checkpoint.stamp != model.source.stamp:
        return Examined(model.path, Condition.OUTDATED, f"{made_from} has changed since it was packed")
    if not deep:
        return Examined(model.path, Condition.CURRENT, f"made from {made_from}, which is unchanged")
    try:
        differing = next(_differences(model, checkpoint), None)
    except ModelError as error:
        return Examined(model.path, Condition.OUTDATED, f"its checkpoint cannot be read: {str(error).rstrip('.')}")
    if differing is not None:
        return Examined(model.path, Condition.DAMAGED, f"{differing} is not what {made_from} gives when it is packed")
    return Examined(model.path, Condition.CURRENT, f"to the last bit what {made_from} gives when it is packed")


def leftovers(home: Path) -> Iterator[tuple[Path, int]]:
    """Files and folders of packing and fetching that were killed, with their bytes; not what is going on just now."""
    for path in sorted((home / "packed").glob("*.tmp")):
        parts = split_packed_name(path.name.rsplit(".", 2)[0])
        if parts is not None and _is_free(path.with_name(f"{parts[0]}.lock")):
            yield path, _nbytes([path])
    for path in sorted((home / "models").glob(".*.fetching")):
        if _is_free(path.with_name(f"{path.name[1 : -len('.fetching')]}.lock")):
            yield path, _nbytes(path.rglob("*"))
    for path in pypi.unnamed(home):
        release = home / "models" / path.relative_to(home / "models").parts[0]
        if _is_free(release.with_name(f"{release.name}.lock")):
            yield path, _nbytes([path])


def _is_free(path: Path) -> bool:
    if not path.exists():
        return True
    with try_lock(path, f"looking whether {path} is held") as held:
        return held


def _nbytes(paths: Iterable[Path]) -> int:
    return sum(path.lstat().st_size for path in paths if path.is_file())


def _versions(path: Path) -> tuple[int, int] | None:
    """Format and layout version of a packed file; None for what does not begin like one."""
    try:
        with path.open("rb") as file:
            magic, *versions = struct.unpack("<8sII", file.read(16))
    except (OSError, struct.error):
        return None
    return (versions[0], versions[1]) if magic == MAGIC else None


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(_BLOCK_BYTES):
            pass


def _not_finite(tensor: PackedTensor, *, deep: bool) -> str | None:
    """Where a tensor holds something that is no number, None where it does not."""
    fmt = tensor.format
    if fmt is None:
        finite = np.isfinite(tensor.data)
        return None if finite.all() else f"entry {int(finite.argmin())}"
    strips = tensor.data.view(np.uint8).reshape(fmt.num_strips, -1)
    chosen = range(fmt.num_strips) if deep else _spread(fmt.num_strips, SAMPLED_STRIPS)
    return next((f"strip {strip}" for strip in chosen if not _strip_is_finite(fmt, strips[strip])), None)


def _strip_is_finite(fmt: MatrixFormat, strip: NDArray[np.uint8]) -> bool:
    """Whether one strip's scales and minimums, or bfloat16 values, are numbers."""
    if not fmt.is_quantized:
        return bool(((strip.view("<u2") & 0x7F80) != 0x7F80).all())
    cells = strip.reshape(fmt.num_groups, fmt.cell_bytes)
    floats = np.ascontiguousarray(cells[:, STRIP * GROUP * fmt.bits // 8 :]).view("<f2")
    return bool(np.isfinite(floats).all())


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of range(count), the first and the last among them."""
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def _checkpoint(model: PackedModel, home: Path) -> Located | None:
    """The checkpoint a file was packed from, None where it would have to be fetched. Raises SourceError."""
    if not model.source.origin:
        return None
    source = parse(model.source.origin)
    match source:
        case WheelSource():
            wheel = source.checkpoint
            return Located(wheel.path(home), wheel.stamp) if pypi.is_complete(wheel, home) else None
        case HubSource():
            record = hub.complete(source.checkpoint, home)
            return Located(record.path(home), record.stamp) if record is not None else None
        case FileSource() | FolderSource():
            return locate(source, home, NoProgress())


def _differences(model: PackedModel, checkpoint: Located) -> Iterator[str]:
    """What of a packed file is not what packing its checkpoint again would write."""
    # Imported here, as in a start: checkpoint formats and the builder of tokenizers are needed for this only.
    from engine.weights.checkpoint import open_checkpoint
    from engine.weights.convert import convert

    with open_checkpoint(checkpoint.path) as file:
        if file.sha256() != model.source.sha256:
            raise FormatError("its checksum is not the one it had when it was packed", path=checkpoint.path)
        info, tensors = convert(file, quantization=model.source.quantization)
        if info != model.info:
            yield "its description of the model"
        for tensor in tensors:
            packed, end = model.weights[tensor.name].data.view(np.uint8), 0
            for chunk in tensor.chunks():
                begin, end = end, end + chunk.nbytes
                if not np.array_equal(packed[begin:end], np.ascontiguousarray(chunk).view(np.uint8).reshape(-1)):
                    yield f"tensor {tensor.name}"
                    break
