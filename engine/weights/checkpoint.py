"""What every checkpoint format offers to `engine.weights.convert`, and how a path becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError
from engine.models.blueprint import Blueprint, Description, Modules
from engine.weights.gguf_tokenizer import TokenizerInfo
from engine.weights.tensor_types import FLOAT_TYPES

COMPARED_BYTES = 4 << 20
"""Bytes of each tensor that are held at a time when two are compared."""


class StoredTensor(Protocol):
    """Where one tensor lies. Its bytes were checked to be inside their file."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first: (outputs, inputs) or (length,)."""
        ...

    @property
    def type_name(self) -> str:
        """As `engine.weights.tensor_types` names it."""
        ...

    @property
    def nbytes(self) -> int: ...


class Checkpoint(Protocol):
    """A checkpoint whose headers were read and checked; its weights are still on disk."""

    @property
    def path(self) -> Path:
        """For messages."""
        ...

    @property
    def format_name(self) -> str:
        """ "GGUF" or "safetensors"."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    def blueprint(self) -> Blueprint[Any]:
        """The model, and how its tensors are put together. Raises UnsupportedModelError or FormatError."""
        ...

    def text(self) -> TokenizerInfo:
        """The tokenizer. Raises UnsupportedModelError or FormatError."""
        ...

    def generation_defaults(self) -> Mapping[str, float]:
        """See `ModelInfo.generation_defaults`. Raises FormatError."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The raw bytes of rows [start, stop) of a tensor (a vector is one row), uint8 [rows, row bytes]."""
        ...

    def sha256(self) -> str:
        """Of everything that was or will be read, in hexadecimal."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None: ...


def open_checkpoint(path: Path) -> Checkpoint:
    """The GGUF file, or the Hugging Face folder, at `path`.

    Raises SourceError where it cannot be opened, FormatError (path, offset, expected and found) where it is malformed.
    """
    if path.is_dir():
        from engine.weights.folder import FolderCheckpoint

        return FolderCheckpoint(path)
    from engine.weights.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)


def describe(
    checkpoint: Checkpoint, config: Mapping[str, object], modules: Callable[[], Modules | None] = lambda: None
) -> Description:
    """What a family's file is given of a checkpoint."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    return Description(config, shapes, partial(read_vector, checkpoint), partial(stored_alike, checkpoint), modules)


def stored_alike(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors are stored with the same shape, type and bytes; reads them a few MB at a time."""
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if (one.shape, one.type_name) != (other.shape, other.type_name):
        return False
    num_rows = math.prod(one.shape[:-1])
    step = max(1, num_rows * COMPARED_BYTES // max(1, one.nbytes))
    return all(
        np.array_equal(checkpoint.read_rows(first, start, stop), checkpoint.read_rows(second, start, stop))
        for start in range(0, num_rows, step)
        for stop in (min(start + step, num_rows),)
    )


def read_vector(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """A one-dimensional tensor of finite floats, float32 [length]. Raises FormatError for any other."""
    tensor = checkpoint.tensors[name]
    decode = FLOAT_TYPES.get(tensor.type_name)
    if len(tensor.shape) != 1 or decode is None:
        raise FormatError(
            f"tensor {name}: expected a vector of {', '.join(FLOAT_TYPES)}, found {tensor.type_name} "
            f"{list(tensor.shape)}",
            path=checkpoint.path,
        )
    values: NDArray[np.float32] = decode(checkpoint.read_rows(name, 0, 1))[0]
    if not np.isfinite(values).all():  # one NaN in a norm makes every answer NaN
        raise FormatError(f"tensor {name} holds a value that is not finite", path=checkpoint.path)
    return values
