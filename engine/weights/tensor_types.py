"""The tensor types that we load, in one table: what each becomes, and how its bytes are read.

GGUF and safetensors give float types the same names. Source: the block structures of ggml (`block_q4_0` and its kin).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.kernels.layout import GROUP, Correction, from_bf16

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of a quantized matrix, before packing. See `engine.kernels.layout` for the arithmetic."""

    bits: int
    quants: NDArray[np.uint8]  # [n, k], unsigned
    scales: NDArray[np.float16]  # [n, k / 32]
    mins: NDArray[np.float16] | None  # [n, k / 32]; None: ZERO_POINT


@dataclass(frozen=True, slots=True)
class QuantizedType:
    """A tensor type whose weights stay quantized."""

    bits: int
    correction: Correction
    decode: Callable[[Bytes], Quantized]  # raw rows uint8 [n, row bytes] -> Quantized


def _nibbles(blocks: Bytes) -> Bytes:
    """uint8 [n, groups, 16] -> quants [n, groups * 32]: low nibbles are inputs 0-15 of the group, high ones 16-31."""
    quants = np.empty((*blocks.shape[:2], GROUP), np.uint8)
    np.bitwise_and(blocks, 15, out=quants[..., : GROUP // 2])
    np.right_shift(blocks, 4, out=quants[..., GROUP // 2 :])
    return quants.reshape(len(blocks), -1)


def _halves(blocks: Bytes, offset: int) -> NDArray[np.float16]:
    """The little-endian float16 at byte `offset` of each block: uint8 [n, groups, size] -> [n, groups]."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0]


def _decode_q4_0(raw: Bytes) -> Quantized:
    blocks = raw.reshape(len(raw), -1, 18)  # float16 scale, 16 bytes of nibbles
    return Quantized(4, _nibbles(blocks[..., 2:]), _halves(blocks, 0), None)


def _decode_q4_1(raw: Bytes) -> Quantized:
    blocks = raw.reshape(len(raw), -1, 20)  # float16 scale, float16 min, 16 bytes of nibbles
    return Quantized(4, _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _decode_q8_0(raw: Bytes) -> Quantized:
    blocks = raw.reshape(len(raw), -1, 34)  # float16 scale, 32 int8
    # int8 + 128 as uint8 is the same byte with its sign bit flipped.
    return Quantized(8, (blocks[..., 2:] ^ np.uint8(0x80)).reshape(len(raw), -1), _halves(blocks, 0), None)


QUANTIZED_TYPES: Mapping[str, QuantizedType] = {
    "Q4_0": QuantizedType(4, Correction.ZERO_POINT, _decode_q4_0),
    "Q4_1": QuantizedType(4, Correction.MIN, _decode_q4_1),
    "Q8_0": QuantizedType(8, Correction.ZERO_POINT, _decode_q8_0),
}

FLOAT_TYPES: Mapping[str, Callable[[Bytes], NDArray[np.float32]]] = {
    "F32": lambda raw: raw.view("<f4").astype(np.float32),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": lambda raw: from_bf16(raw.view("<u2")),
}
"""Raw rows uint8 [n, row bytes] -> float32 [n, k], exactly."""
