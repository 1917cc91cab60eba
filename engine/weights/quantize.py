"""Float weights to groups of 32 quants: what `--quantization int8` and `int4` do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.kernels.layout import GROUP, Correction
from engine.weights.tensor_types import Quantized

FLOAT_TARGETS = {4: Correction.MIN, 8: Correction.ZERO_POINT}
"""How each width stores what was float: with 16 levels a group's own range matters, with 256 it does not."""

MAX_QUANTIZED = float(np.finfo(np.float16).max)
"""The largest magnitude that a weight may have: up to it, scales and mins are finite in float16."""

_REFITS = 5
_PIECE = 4096
"""Groups quantized at a time: what is computed of them stays in a core's cache."""

_Floats = NDArray[np.float32]
_Halves = NDArray[np.float16]


def quantize(values: NDArray[np.float32], bits: int) -> Quantized:
    """Quantize weights float32 [n, k] of at most MAX_QUANTIZED, k a multiple of 32, to 8 bits (ZERO_POINT) or 4 (MIN).

    With 8 bits a weight is off by at most half its group's scale, which is the largest magnitude / 127. With 4 bits
    the squared error of a group is at most that of rounding to 16 levels from its smallest to its largest weight.
    Scales below float16's normal numbers add at most 2^-18, and a min its own rounding to float16.
    """
    n, k = values.shape
    groups = values.reshape(-1, GROUP)
    quants = np.empty(groups.shape, np.uint8)
    scales = np.empty(len(groups), np.float16)
    mins = np.empty_like(scales) if FLOAT_TARGETS[bits] is Correction.MIN else None
    for begin in range(0, len(groups), _PIECE):
        piece = slice(begin, begin + _PIECE)
        columns = np.ascontiguousarray(groups[piece].T)  # [32, groups]: sums over a group run along whole vectors
        if mins is None:
            levels, scales[piece] = _to_8_bits(columns)
        else:
            levels, scales[piece], mins[piece] = _to_4_bits(columns)
        quants[piece] = levels.T
    shape = (n, k // GROUP)
    return Quantized(bits, quants.reshape(n, k), scales.reshape(shape), None if mins is None else mins.reshape(shape))


def _to_8_bits(groups: _Floats) -> tuple[_Floats, _Halves]:
    """Symmetric: the largest magnitude of a group is quant 127 away from the zero point 128."""
    largest = np.maximum(groups.max(axis=0), -groups.min(axis=0))
    # Rounded to float16 first, so that the quants are the best for the scale that is stored.
    scales = _float16(largest / np.float32(127))
    levels = groups * _inverse(scales)
    np.rint(levels, out=levels)
    levels += 128
    return np.clip(levels, 0, 255, out=levels), scales


def _to_4_bits(groups: _Floats) -> tuple[_Floats, _Halves, _Halves]:
    """From a group's smallest to its largest weight, then a few rounds of least squares: given the quants, the scale
    and min that are nearest to the weights; given those, the nearest quants. Kept where they helped."""
    low, high = groups.min(axis=0), groups.max(axis=0)
    first_scales, first_mins = _float16((high - low) / np.float32(15)), _float16(low)
    first_levels = _levels(groups, first_scales, first_mins)
    scales, mins, levels = first_scales, first_mins, first_levels
    means = groups.mean(axis=0)
    for _ in range(_REFITS):
        level_means = levels.mean(axis=0)
        centered = levels - level_means
        variances = _dot(centered, centered)
        # A group of one level has no slope: it keeps its scale.
        slopes = np.divide(_dot(centered, groups), variances, out=scales.astype(np.float32), where=variances > 0)
        scales = _float16(slopes)
        mins = _float16(means - scales.astype(np.float32) * level_means)
        levels = _levels(groups, scales, mins)
    better = _squared_error(groups, levels, scales, mins) < _squared_error(
        groups, first_levels, first_scales, first_mins
    )
    np.copyto(first_levels, levels, where=better)
    return first_levels, np.where(better, scales, first_scales), np.where(better, mins, first_mins)


def _levels(groups: _Floats, scales: _Halves, mins: _Halves) -> _Floats:
    """The nearest of 16 levels of each weight."""
    levels = groups - mins.astype(np.float32)
    levels *= _inverse(scales)
    np.rint(levels, out=levels)
    return np.clip(levels, 0, 15, out=levels)


def _squared_error(groups: _Floats, levels: _Floats, scales: _Halves, mins: _Halves) -> _Floats:
    off = levels * scales.astype(np.float32)
    off += mins.astype(np.float32)
    off -= groups
    return _dot(off, off)


def _dot(a: _Floats, b: _Floats) -> _Floats:
    """The sum of products over each group, [32, groups] -> [groups]."""
    total: _Floats = np.einsum("ig,ig->g", a, b)
    return total


def _inverse(scales: _Halves) -> _Floats:
    """1 / scale, 0 where the scale is 0."""
    wide = scales.astype(np.float32)
    inverse: _Floats = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)
    return inverse


def _float16(values: _Floats) -> _Halves:
    """The nearest float16, the largest finite one for what a fit puts beyond it."""
    rounded: _Halves = np.clip(values, -MAX_QUANTIZED, MAX_QUANTIZED).astype(np.float16)
    return rounded
