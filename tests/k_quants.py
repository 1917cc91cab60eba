"""Float weights as K-quants: a plain quantizer for tests, because the `gguf` library only reads them.

Source: the block structures of ggml (`block_q4_K` and its kin).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 256


def quantize(values: Floats, kind: str) -> Bytes:
    """float32 [n, k], k a multiple of 256, as raw rows of "Q4_K", "Q5_K" or "Q6_K", uint8 [n, row bytes]."""
    blocks = values.reshape(len(values), -1, BLOCK)
    made = _q6_k(blocks) if kind == "Q6_K" else _with_mins(blocks, {"Q4_K": 4, "Q5_K": 5}[kind])
    return made.reshape(len(values), -1)


def _with_mins(blocks: Floats, bits: int) -> Bytes:
    """weight = d * scale * quant - dmin * min; 8 groups of 32 in a block."""
    groups = blocks.reshape(*blocks.shape[:2], 8, 32)
    top = (1 << bits) - 1
    offsets = -np.minimum(groups.min(axis=3), 0)
    spans = (np.maximum(groups.max(axis=3), 0) + offsets) / top
    d, scales = _six_bits(spans)
    dmin, mins = _six_bits(offsets)
    steps, lows = d.astype(np.float32) * scales, dmin.astype(np.float32) * mins
    quants = np.clip(np.rint(_divide(groups + lows[..., None], steps[..., None])), 0, top).astype(np.uint8)
    low, high = scales[..., :4], scales[..., 4:]
    mid, last = mins[..., :4], mins[..., 4:]
    parts = [
        _raw(d),
        _raw(dmin),
        low | (high >> 4) << 6,
        mid | (last >> 4) << 6,
        (high & 15) | (last & 15) << 4,
    ]
    if bits == 5:
        parts.append(np.packbits(quants >> 4, axis=2, bitorder="little")[..., 0, :])
    pairs = (quants & 15).reshape(*blocks.shape[:2], 4, 2, 32)
    parts.append((pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*blocks.shape[:2], 128))
    return np.concatenate(parts, axis=2)


def _q6_k(blocks: Floats) -> Bytes:
    """weight = d * scale * (quant - 32); 16 groups of 16 in a block, whose extreme is quant 0 whatever its sign."""
    groups = blocks.reshape(*blocks.shape[:2], 16, 16)
    at = np.abs(groups).argmax(axis=3, keepdims=True)
    wanted = np.take_along_axis(groups, at, axis=3)[..., 0] / np.float32(-32)
    d = (np.abs(wanted).max(axis=2, keepdims=True) / 127).astype(np.float16)
    scales = np.clip(np.rint(_divide(wanted, d.astype(np.float32))), -128, 127).astype(np.int8)
    steps = d.astype(np.float32) * scales
    quants = (np.clip(np.rint(_divide(groups, steps[..., None])), -32, 31) + 32).astype(np.uint8)
    nibbles = (quants & 15).reshape(*blocks.shape[:2], 2, 2, 64)
    pairs = (quants >> 4).reshape(*blocks.shape[:2], 2, 4, 32)
    high = pairs[..., 0, :] | pairs[..., 1, :] << 2 | pairs[..., 2, :] << 4 | pairs[..., 3, :] << 6
    parts = [
        (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(*blocks.shape[:2], 128),
        high.reshape(*blocks.shape[:2], 64),
        scales.view(np.uint8),
        _raw(d),
    ]
    return np.concatenate(parts, axis=2)


def _six_bits(values: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """Non-negative values [..., 8] as a common float16 factor [..., 1] and 6-bit integers."""
    factor = (values.max(axis=-1, keepdims=True) / 63).astype(np.float16)
    return factor, np.clip(np.rint(_divide(values, factor.astype(np.float32))), 0, 63).astype(np.uint8)


def _divide(values: Floats, by: Floats) -> Floats:
    """values / by, 0 where `by` is 0."""
    out = np.zeros(np.broadcast_shapes(values.shape, by.shape), np.float32)
    divided: Floats = np.divide(values, by, out=out, where=by != 0)
    return divided


def _raw(values: NDArray[np.float16]) -> Bytes:
    """float16 [..., 1] as its bytes, uint8 [..., 2]."""
    return np.ascontiguousarray(values, "<f2").view(np.uint8)
