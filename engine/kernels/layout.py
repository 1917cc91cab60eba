"""The packed layout of quantized matrices: what is on disk, what is mapped, and what every kernel reads.

A matrix [outputs n, inputs k] is cut into strips of 64 outputs and groups of 32 inputs. One strip's groups follow one
another, so a strip is one sequential stream. Each (strip, group) cell holds, without padding:

    quants   2 halves of 32 outputs; each is 4 (4-bit) or 8 (8-bit) rows of 128 bytes
    scales   float16 [64]
    mins     float16 [64], only with Correction.MIN

A 128-byte row is 32 lanes of 4 bytes, one lane an output. 8-bit: row r holds inputs 4r to 4r + 3 of the group. 4-bit:
row r holds inputs 8r to 8r + 3 in the low and 8r + 4 to 8r + 7 in the high nibbles. A kernel works on the 32 outputs of
a half at once, so it reads every cell in the order of its bytes: with the two vectors of a row 512 bytes apart, 8-bit
weights streamed from memory at 9 GB/s where they now do at 24. Quants are unsigned:

    weight = scale * (quant - zero_point)    Correction.ZERO_POINT, zero_point 8 (4-bit) or 128 (8-bit)
    weight = scale * quant + min             Correction.MIN

Outputs are padded to whole strips with zero scales (and mins), so that padding computes exact zeros.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LAYOUT_VERSION = 2
"""Raise it with every change of what is described above: files packed in another version are packed again."""

STRIP = 64
GROUP = 32
HALF = 32
LANES = 16


class Correction(enum.IntEnum):
    """How an unsigned quant becomes a weight."""

    ZERO_POINT = 0
    MIN = 1


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """Shape and arithmetic of one packed matrix."""

    n: int  # outputs
    k: int  # inputs, a multiple of GROUP
    bits: int  # 4 or 8
    correction: Correction

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < GROUP or self.k % GROUP:
            raise ValueError(f"packed matrix [{self.n}, {self.k}]: inputs must be a positive multiple of {GROUP}")
        if self.bits not in (4, 8):
            raise ValueError(f"packed matrix: bits must be 4 or 8, got {self.bits}")

    @property
    def num_strips(self) -> int:
        return -(-self.n // STRIP)

    @property
    def num_groups(self) -> int:
        return self.k // GROUP

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one (strip, group) cell."""
        return STRIP * GROUP * self.bits // 8 + STRIP * 2 * (1 + self.correction)

    @property
    def nbytes(self) -> int:
        return self.num_strips * self.num_groups * self.cell_bytes


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor of a packed checkpoint: a matrix in this layout, or a vector (format None)."""

    format: MatrixFormat | None
    data: NDArray[np.uint8] | NDArray[np.float32]  # uint8 [format.nbytes], read-only; a vector: float32 [length]


def pack_matrix(
    quants: NDArray[np.uint8],
    scales: NDArray[np.float16],
    mins: NDArray[np.float16] | None,
    *,
    bits: int,
) -> tuple[MatrixFormat, NDArray[np.uint8]]:
    """Pack quants uint8 [n, k], scales [n, k / 32] and mins [n, k / 32] (None: ZERO_POINT) into uint8 [nbytes]."""
    n, k = quants.shape
    fmt = MatrixFormat(n, k, bits, Correction.ZERO_POINT if mins is None else Correction.MIN)
    if scales.shape != (n, fmt.num_groups) or (mins is not None and mins.shape != scales.shape):
        raise ValueError(f"pack_matrix: scales must be [{n}, {fmt.num_groups}], got {list(scales.shape)}")
    s, g, pad = fmt.num_strips, fmt.num_groups, fmt.num_strips * STRIP - n
    quants = np.pad(quants, ((0, pad), (0, 0)))
    # [strip, half, lane, group, row, nibble, byte] -> [strip, group, half, row, nibble, lane, byte]
    nibbles = 2 if bits == 4 else 1
    cells = quants.reshape(s, 2, HALF, g, GROUP // (4 * nibbles), nibbles, 4).transpose(0, 3, 1, 4, 5, 2, 6)
    rows = cells[..., 0, :, :] if bits == 8 else cells[..., 0, :, :] | (cells[..., 1, :, :] << 4)
    parts = [rows.reshape(s, g, -1)]
    for values in (scales,) if mins is None else (scales, mins):
        padded = np.pad(values, ((0, pad), (0, 0))).reshape(s, STRIP, g).transpose(0, 2, 1)
        parts.append(np.ascontiguousarray(padded).view(np.uint8).reshape(s, g, STRIP * 2))
    packed = np.concatenate(parts, axis=2).reshape(-1)
    assert packed.nbytes == fmt.nbytes
    return fmt, packed


def unpack_matrix(
    fmt: MatrixFormat, packed: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16] | None]:
    """The inverse of pack_matrix: quants uint8 [n, k], scales [n, k / 32], mins [n, k / 32] or None."""
    if packed.nbytes != fmt.nbytes:
        raise ValueError(f"packed matrix [{fmt.n}, {fmt.k}]: expected {fmt.nbytes} bytes, got {packed.nbytes}")
    s, g = fmt.num_strips, fmt.num_groups
    cells = packed.reshape(s, g, fmt.cell_bytes)
    quant_bytes = STRIP * GROUP * fmt.bits // 8
    rows = cells[:, :, :quant_bytes].reshape(s, g, 2, -1, 1, HALF, 4)
    if fmt.bits == 4:
        rows = np.concatenate((rows & 15, rows >> 4), axis=4)
    quants = rows.transpose(0, 2, 5, 1, 3, 4, 6).reshape(s * STRIP, fmt.k)[: fmt.n]

    def column(offset: int) -> NDArray[np.float16]:
        raw = np.ascontiguousarray(cells[:, :, offset : offset + STRIP * 2]).view(np.float16)
        return raw.transpose(0, 2, 1).reshape(s * STRIP, g)[: fmt.n]

    mins = column(quant_bytes + STRIP * 2) if fmt.correction is Correction.MIN else None
    return quants, column(quant_bytes), mins


def dequantize(fmt: MatrixFormat, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The weights a packed matrix stands for, float32 [n, k]."""
    quants, scales, mins = unpack_matrix(fmt, packed)
    q = quants.reshape(fmt.n, fmt.num_groups, GROUP).astype(np.float32)
    d = scales.astype(np.float32)[:, :, None]
    w = d * (q - fmt.zero_point) if mins is None else d * q + mins.astype(np.float32)[:, :, None]
    return w.reshape(fmt.n, fmt.k)
