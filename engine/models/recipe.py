"""How one of our tensors is put together from a checkpoint's: which parts, and in which order of rows.

A family's file says this as data; `engine.weights` reads the parts and packs them. Rows can be moved freely, quantized
ones too, because quantization groups run along a row's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one tensor of the checkpoint, and the shape they have: (outputs, inputs), or (length,) of a vector."""

    tensor: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0  # rows hold this many heads stored for interleaved rope; 0: rows are taken as stored
    first_row: int = 0  # in the tensor
    stored: tuple[int, ...] = ()  # the shape that the tensor must have, where that is another; rows run through all
    plus: float = 0.0  # added to a vector's values

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the tensor must have."""
        return self.stored or self.shape


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor of `DecoderSpec.tensor_shapes`: the rows of `parts`, stacked, or `block` rows from each in turn."""

    name: str
    parts: tuple[Part, ...]
    block: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each row comes from: index of the part int64 [n], row within that part int64 [n]."""
        counts = [part.shape[0] for part in self.parts]
        parts = np.repeat(np.arange(len(counts)), counts)
        rows = np.concatenate([_stored_rows(part) for part in self.parts])
        if self.block is None:
            return parts, rows
        if len(set(counts)) != 1 or counts[0] % self.block:
            raise ValueError(f"{self.name}: parts must have equal rows, a multiple of {self.block}, got {counts}")
        order = np.arange(len(rows)).reshape(len(counts), -1, self.block).transpose(1, 0, 2).reshape(-1)
        return parts[order], rows[order]


def _stored_rows(part: Part) -> NDArray[np.int64]:
    """For each row in half-split order, the stored row, int64 [n].

    Interleaved rope turns lanes 2i and 2i + 1 of a head together, half-split rope lanes i and i + dim / 2: lane
    (half j, i) is stored as lane 2i + j.
    """
    rows = part.first_row + np.arange(part.shape[0])
    if not part.interleaved_heads:
        return rows
    return rows.reshape(part.interleaved_heads, -1, 2).transpose(0, 2, 1).reshape(-1)
