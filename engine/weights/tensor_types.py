"""The tensor types that we load, in one table: what each becomes, and how its bytes are read.

GGUF and safetensors give float types the same names. Source: the block structures of ggml (`block_q4_0` and its kin).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.kernels.layout import Correction, from_bf16

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
    """uint8 [n, blocks, size] -> quants [n, blocks * 2 * size]: a block's low nibbles, then its high ones."""
    size = blocks.shape[2]
    quants = np.empty((*blocks.shape[:2], 2 * size), np.uint8)
    np.bitwise_and(blocks, 15, out=quants[..., :size])
    np.right_shift(blocks, 4, out=quants[..., size:])
    return quants.reshape(len(blocks), -1)


def _halves(blocks: Bytes, offset: int) -> NDArray[np.float16]:
    """The little-endian float16 at byte `offset` of each block: uint8 [n, blocks, size] -> [n, blocks]."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0]


def _fifth_bits(blocks: Bytes) -> Bytes:
    """The high bits of 5-bit quants, uint8 [n, groups, 4] (bit i: input i of the group) -> 0 or 16 [n, groups * 32]."""
    return np.unpackbits(blocks, axis=2, bitorder="little").reshape(len(blocks), -1) << np.uint8(4)


def _decode_q4_0(raw: Bytes) -> Quantized:
    """weight = scale * (quant - 8): carried over exactly."""
    blocks = raw.reshape(len(raw), -1, 18)  # float16 scale, 16 bytes of nibbles
    return Quantized(4, _nibbles(blocks[..., 2:]), _halves(blocks, 0), None)


def _decode_q4_1(raw: Bytes) -> Quantized:
    """weight = scale * quant + min: carried over exactly."""
    blocks = raw.reshape(len(raw), -1, 20)  # float16 scale, float16 min, 16 bytes of nibbles
    return Quantized(4, _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _decode_q5_0(raw: Bytes) -> Quantized:
    """weight = scale * (quant - 16): exact in 8 bits, whose zero point is 128."""
    blocks = raw.reshape(len(raw), -1, 22)  # float16 scale, 4 bytes of fifth bits, 16 bytes of nibbles
    quants = _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6])
    return Quantized(8, quants + np.uint8(128 - 16), _halves(blocks, 0), None)


def _decode_q5_1(raw: Bytes) -> Quantized:
    """weight = scale * quant + min: exact in 8 bits."""
    blocks = raw.reshape(len(raw), -1, 24)  # float16 scale, float16 min, 4 bytes of fifth bits, 16 bytes of nibbles
    quants = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Quantized(8, quants, _halves(blocks, 0), _halves(blocks, 2))


def _decode_q8_0(raw: Bytes) -> Quantized:
    """weight = scale * quant: carried over exactly."""
    blocks = raw.reshape(len(raw), -1, 34)  # float16 scale, 32 int8
    # int8 + 128 as uint8 is the same byte with its sign bit flipped.
    return Quantized(8, (blocks[..., 2:] ^ np.uint8(0x80)).reshape(len(raw), -1), _halves(blocks, 0), None)


def _decode_q4_k(raw: Bytes) -> Quantized:
    """weight = d * scale * quant - dmin * min, a 6-bit scale and min for each group. Both products are rounded to
    float16: a weight is off by at most 2^-11 (|d * scale * quant| + |dmin * min|) + 2^-25 (quant + 1)."""
    blocks = raw.reshape(len(raw), -1, 144)  # d, dmin, 12 bytes of scales and mins, 128 of nibbles
    quants = _nibbles(blocks[..., 16:].reshape(len(raw), -1, 32))
    return Quantized(4, quants, *_scales_and_mins(blocks))


def _decode_q5_k(raw: Bytes) -> Quantized:
    """As Q4_K with 5-bit quants, and the same bound."""
    blocks = raw.reshape(len(raw), -1, 176)  # d, dmin, 12 bytes of scales and mins, 32 of fifth bits, 128 of nibbles
    quants = _nibbles(blocks[..., 48:].reshape(len(raw), -1, 32))
    fifth = np.unpackbits(blocks[..., None, 16:48], axis=2, bitorder="little")  # bit i of a byte: group i
    return Quantized(8, quants | fifth.reshape(len(raw), -1) << np.uint8(4), *_scales_and_mins(blocks))


@np.errstate(over="ignore", invalid="ignore")  # what is not finite in float16 is refused where its tensor can be named
def _scales_and_mins(blocks: Bytes) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """The scales and mins of 4- and 5-bit K-quants, float16 [n, k / 32] each, from blocks uint8 [n, k / 256, size]."""
    low, mid, high = np.split(blocks[..., 4:16], 3, axis=2)  # 6 bits each: groups 0-3 in low and mid, the rest spread
    scales = np.concatenate((low & 63, (high & 15) | (low >> 2 & 48)), axis=2)
    mins = np.concatenate((mid & 63, (high >> 4) | (mid >> 2 & 48)), axis=2)
    d, dmin = (_halves(blocks, offset).astype(np.float32)[..., None] for offset in (0, 2))
    rows = len(blocks)
    return (d * scales).astype(np.float16).reshape(rows, -1), (-dmin * mins).astype(np.float16).reshape(rows, -1)


@np.errstate(over="ignore", invalid="ignore")
def _decode_q6_k(raw: Bytes) -> Quantized:
    """weight = d * scale * (quant - 32), an 8-bit scale for each 16 inputs, so our groups hold two steps d * scale.

    The new scale is a quarter of the larger one: its 16 weights keep their quants (times 4, which 8 bits just hold) and
    are off by the scale's rounding to float16, 2^-11 |weight|; the others are off by at most half the new scale, which
    is their group's largest magnitude / 128 where a quantizer used all levels. Where the two steps are each other's
    negatives nothing else is off, but quant 0 of the second would be 128 and becomes 127. Scales below float16's
    normal numbers add at most 2^-18.
    """
    blocks = raw.reshape(len(raw), -1, 210)  # 128 bytes of nibbles, 64 of bit pairs, 16 int8 scales, d
    pairs = blocks[..., 128:192].reshape(len(raw), -1, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    quants = _nibbles(blocks[..., :128].reshape(len(raw), -1, 64)) | (pairs & 3).reshape(len(raw), -1) << 4
    steps = _halves(blocks, 208).astype(np.float32)[..., None] * blocks[..., 192:208].view(np.int8)
    steps = steps.reshape(len(raw), -1, 2)
    first, second = steps[..., 0], steps[..., 1]
    larger = np.where(np.abs(first) >= np.abs(second), first, second)
    scales = (larger / np.float32(4)).astype(np.float16)
    wide = scales.astype(np.float32)[..., None]
    ratios = np.divide(steps, wide, out=np.zeros_like(steps), where=wide != 0)
    values = quants.reshape(*steps.shape, 16).astype(np.float32)
    values -= 32
    values *= ratios[..., None]
    np.clip(np.rint(values, out=values), -128, 127, out=values)
    values += 128
    return Quantized(8, values.astype(np.uint8).reshape(len(raw), -1), scales, None)


QUANTIZED_TYPES: Mapping[str, QuantizedType] = {
    "Q4_0": QuantizedType(4, Correction.ZERO_POINT, _decode_q4_0),
    "Q4_1": QuantizedType(4, Correction.MIN, _decode_q4_1),
    "Q5_0": QuantizedType(8, Correction.ZERO_POINT, _decode_q5_0),
    "Q5_1": QuantizedType(8, Correction.MIN, _decode_q5_1),
    "Q8_0": QuantizedType(8, Correction.ZERO_POINT, _decode_q8_0),
    "Q4_K": QuantizedType(4, Correction.MIN, _decode_q4_k),
    "Q5_K": QuantizedType(8, Correction.MIN, _decode_q5_k),
    "Q6_K": QuantizedType(8, Correction.ZERO_POINT, _decode_q6_k),
}

FLOAT_TYPES: Mapping[str, Callable[[Bytes], NDArray[np.float32]]] = {
    "F32": lambda raw: raw.view("<f4").astype(np.float32, copy=False),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": lambda raw: from_bf16(raw.view("<u2")),
}
"""Raw rows uint8 [n, row bytes] -> float32 [n, k], exactly."""
