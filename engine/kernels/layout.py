"""The packed layouts of matrices, quantized and bfloat16: what is on disk, what is mapped, what every kernel reads.

A matrix [outputs n, inputs k] is cut into strips of 64 outputs and groups of 32 inputs. One strip's groups follow one
another, so a strip is one sequential stream. Each (strip, group) cell holds, without padding:

    values   2 halves of 32 outputs; each is 4 (4-bit), 8 (8-bit) or 16 (bfloat16) rows of 128 bytes
    scales   float16 [64], only where values are quants
    mins     float16 [64], only with Correction.MIN

A 128-byte row is 32 lanes of 4 bytes, one lane an output. bfloat16: row r holds inputs 2r and 2r + 1 of the group.
8-bit: row r holds inputs 4r to 4r + 3. 4-bit: row r holds inputs 8r to 8r + 3 in the low and 8r + 4 to 8r + 7 in the
high nibbles. A kernel works on the 32 outputs of a half at once, so it reads every cell in the order of its bytes: with
the two vectors of a row 512 bytes apart, 8-bit weights streamed from memory at 9 GB/s where they now do at 24. Quants
are unsigned:

    weight = scale * (quant - zero_point)    Correction.ZERO_POINT, zero_point 8 (4-bit) or 128 (8-bit)
    weight = scale * quant + min             Correction.MIN
    weight = value                           Correction.NONE, bfloat16

Outputs are padded to whole strips with zeros (values of bfloat16, scales and mins of quants), so that padding computes
exact zeros.
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
    """How a stored value becomes a weight."""

    ZERO_POINT = 0
    MIN = 1
    NONE = 2  # bfloat16, and only that


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """Shape and arithmetic of one packed matrix."""

    n: int  # outputs
    k: int  # inputs, a multiple of GROUP
    bits: int  # 4 or 8: quants; 16: bfloat16
    correction: Correction

    def __post_init__(self) -> None:
        if self.n < 1 or self.k < GROUP or self.k % GROUP:
            raise ValueError(f"packed matrix [{self.n}, {self.k}]: inputs must be a positive multiple of {GROUP}")
        if self.bits not in (4, 8, 16):
            raise ValueError(f"packed matrix: bits must be 4, 8 or 16, got {self.bits}")
        if (self.bits == 16) != (self.correction is Correction.NONE):
            raise ValueError(f"packed matrix: {self.bits} bits do not go with {self.correction.name}")

    @property
    def num_strips(self) -> int:
        return -(-self.n // STRIP)

    @property
    def num_groups(self) -> int:
        return self.k // GROUP

    @property
    def is_quantized(self) -> bool:
        return self.correction is not Correction.NONE

    @property
    def zero_point(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def num_corrections(self) -> int:
        """float16 values per output and group: scales, mins."""
        return {Correction.NONE: 0, Correction.ZERO_POINT: 1, Correction.MIN: 2}[self.correction]

    @property
    def cell_bytes(self) -> int:
        """Bytes of one (strip, group) cell."""
        return STRIP * GROUP * self.bits // 8 + STRIP * 2 * self.num_corrections

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


def pack_bf16(values: NDArray[np.uint16]) -> tuple[MatrixFormat, NDArray[np.uint8]]:
    """Pack the bits of bfloat16 values, uint16 [n, k], into uint8 [nbytes]."""
    n, k = values.shape
    fmt = MatrixFormat(n, k, 16, Correction.NONE)
    s, g = fmt.num_strips, fmt.num_groups
    padded = np.pad(values, ((0, s * STRIP - n), (0, 0)))
    # [strip, half, lane, group, row, input] -> [strip, group, half, row, lane, input]
    cells = padded.reshape(s, 2, HALF, g, GROUP // 2, 2).transpose(0, 3, 1, 4, 2, 5)
    packed = np.ascontiguousarray(cells, "<u2").view(np.uint8).reshape(-1)
    assert packed.nbytes == fmt.nbytes
    return fmt, packed


def unpack_bf16(fmt: MatrixFormat, packed: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """The inverse of pack_bf16: bits of bfloat16 values, uint16 [n, k]."""
    _need_size(fmt, packed)
    s, g = fmt.num_strips, fmt.num_groups
    cells = packed.view("<u2").reshape(s, g, 2, GROUP // 2, HALF, 2).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cells.reshape(s * STRIP, fmt.k)[: fmt.n], np.uint16)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even, uint16 of the same shape; infinite past the largest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Half of the last kept bit, less one where that bit is 0: a tie then rounds to even. NaN stays one.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits, exactly: a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def unpack_matrix(
    fmt: MatrixFormat, packed: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16] | None]:
    """The inverse of pack_matrix: quants uint8 [n, k], scales [n, k / 32], mins [n, k / 32] or None."""
    _need_size(fmt, packed)
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
    if not fmt.is_quantized:
        return from_bf16(unpack_bf16(fmt, packed))
    quants, scales, mins = unpack_matrix(fmt, packed)
    q = quants.reshape(fmt.n, fmt.num_groups, GROUP).astype(np.float32)
    d = scales.astype(np.float32)[:, :, None]
    w = d * (q - fmt.zero_point) if mins is None else d * q + mins.astype(np.float32)[:, :, None]
    return w.reshape(fmt.n, fmt.k)


def _need_size(fmt: MatrixFormat, packed: NDArray[np.uint8]) -> None:
    if packed.nbytes != fmt.nbytes:
        raise ValueError(f"packed matrix [{fmt.n}, {fmt.k}]: expected {fmt.nbytes} bytes, got {packed.nbytes}")
