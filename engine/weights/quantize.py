"""Float weights to groups of 32 quants: what `--quantization int8` and `int4` do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.kernels.layout import GROUP, Correction
from engine.weights.tensor_types import Quantized

FLOAT_TARGETS = {4: Correction.MIN, 8: Correction.ZERO_POINT}
"""How each width stores what was float: with 16 levels a group's own range matters, with 256 it does not."""

_REFITS = 3


def quantize(values: NDArray[np.float32], bits: int) -> Quantized:
    """Quantize finite weights float32 [n, k], k a multiple of 32, to 8 bits (ZERO_POINT) or 4 bits (MIN)."""
    groups = values.reshape(len(values), -1, GROUP)
    return _to_8_bits(groups) if bits == 8 else _to_4_bits(groups)


def _to_8_bits(groups: NDArray[np.float32]) -> Quantized:
    """Symmetric: the largest magnitude of a group is quant 127 away from the zero point 128."""
    # Rounded to float16 first, so that the quants are the best for the scale that is stored.
    scales = _float16(np.abs(groups).max(axis=2) / np.float32(127))
    quants = np.clip(np.rint(_divide(groups, scales)), -128, 127) + 128
    return Quantized(8, _flat(quants), scales, None)


def _to_4_bits(groups: NDArray[np.float32]) -> Quantized:
    """From a group's smallest to its largest weight, then a few rounds of least squares: given the quants, the scale
    and min that are nearest to the weights; given those, the nearest quants. A round is kept only where it helps."""
    low, high = groups.min(axis=2), groups.max(axis=2)
    scales, mins = _float16((high - low) / np.float32(15)), _float16(low)
    quants = _levels(groups, scales, mins)
    error = _squared_error(groups, quants, scales, mins)
    for _ in range(_REFITS):
        centered = quants - quants.mean(axis=2, keepdims=True)
        variance = (centered * centered).sum(axis=2)
        slope = (centered * groups).sum(axis=2) / np.where(variance > 0, variance, 1)
        slope = np.where(variance > 0, slope, scales)
        new_scales = _float16(slope)
        new_mins = _float16(groups.mean(axis=2) - new_scales.astype(np.float32) * quants.mean(axis=2))
        new_quants = _levels(groups, new_scales, new_mins)
        new_error = _squared_error(groups, new_quants, new_scales, new_mins)
        better = new_error < error
        scales, mins = np.where(better, new_scales, scales), np.where(better, new_mins, mins)
        quants = np.where(better[..., None], new_quants, quants)
        error = np.where(better, new_error, error)
    return Quantized(4, _flat(quants), scales, mins)


def _levels(groups: NDArray[np.float32], scales: NDArray[np.float16], mins: NDArray[np.float16]) -> NDArray[np.float32]:
    return np.clip(np.rint(_divide(groups - mins.astype(np.float32)[..., None], scales)), 0, 15)


def _squared_error(
    groups: NDArray[np.float32], quants: NDArray[np.float32], scales: NDArray[np.float16], mins: NDArray[np.float16]
) -> NDArray[np.float32]:
    off = groups - quants * scales.astype(np.float32)[..., None] - mins.astype(np.float32)[..., None]
    total: NDArray[np.float32] = (off * off).sum(axis=2)
    return total


def _divide(groups: NDArray[np.float32], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """groups / scales, 0 where the scale is 0."""
    wide = scales.astype(np.float32)[..., None]
    out: NDArray[np.float32] = np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0)
    return out


def _float16(values: NDArray[np.floating]) -> NDArray[np.float16]:
    """The nearest float16, the largest finite one for what is beyond it: no weight becomes infinite."""
    limit = float(np.finfo(np.float16).max)
    rounded: NDArray[np.float16] = np.clip(values, -limit, limit).astype(np.float16)
    return rounded


def _flat(quants: NDArray[np.float32]) -> NDArray[np.uint8]:
    return quants.astype(np.uint8).reshape(len(quants), -1)
