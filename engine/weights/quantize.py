"""Float weights to groups of 32 quants: what `--quantization int8` and `int4` do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.kernels.layout import GROUP, Correction
from engine.weights.tensor_types import Quantized

FLOAT_CORRECTION = Correction.MIN
"""How what was float is stored: levels that span a group's own range are 12 % finer for normally distributed weights
than levels around zero, and 256 of them fall on the 16 that weights may have had before (255 is a multiple of 15). A
min costs 6 % more bytes with 8 bits."""

MAX_QUANTIZED = float(np.finfo(np.float16).max)
"""The largest magnitude that a weight may have: up to it, scales and mins are finite in float16."""

_REFITS = 5
_PIECE = 4096
"""Groups quantized at a time: what is computed of them stays in a core's cache."""

_Floats = NDArray[np.float32]
_Halves = NDArray[np.float16]


def quantize(values: NDArray[np.float32], bits: int) -> Quantized:
    """Quantize weights float32 [n, k] of at most MAX_QUANTIZED, k a multiple of 32, to 4 or 8 bits with mins.

    With 8 bits a weight is off by at most half its group's scale, which is the group's range / 255, and by what float16
    rounds off the min and the scale: 2^-11 of the smallest weight and of the range. With 4 bits the squared error of a
    group is at most that of rounding to 16 levels from its smallest to its largest weight. Scales below float16's
    normal numbers add at most 2^-17.
    """
    n, k = values.shape
    groups = values.reshape(-1, GROUP)
    quants = np.empty(groups.shape, np.uint8)
    scales, mins = np.empty(len(groups), np.float16), np.empty(len(groups), np.float16)
    for begin in range(0, len(groups), _PIECE):
        piece = slice(begin, begin + _PIECE)
        columns = np.ascontiguousarray(groups[piece].T)  # [32, groups]: sums over a group run along whole vectors
        levels, scales[piece], mins[piece] = _refitted(columns) if bits == 4 else _from_min_to_max(columns, 255)
        quants[piece] = levels.T
    shape = (n, k // GROUP)
    return Quantized(bits, quants.reshape(n, k), scales.reshape(shape), mins.reshape(shape))


def _from_min_to_max(groups: _Floats, top: int) -> tuple[_Floats, _Halves, _Halves]:
    """Levels 0 to `top` from a group's smallest to its largest weight, and the scales and mins that they stand on."""
    low, high = groups.min(axis=0), groups.max(axis=0)
    # Rounded to float16 first, so that the levels are the nearest for the scale and min that are stored.
    scales, mins = _float16((high - low) / np.float32(top)), _float16(low)
    return _levels(groups, scales, mins, top), scales, mins


def _refitted(groups: _Floats) -> tuple[_Floats, _Halves, _Halves]:
    """16 levels from min to max, then a few rounds of least squares: given the levels, the scale and min that are
    nearest to the weights; given those, the nearest levels. Kept where they helped."""
    first_levels, first_scales, first_mins = _from_min_to_max(groups, 15)
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
        levels = _levels(groups, scales, mins, 15)
    better = _squared_error(groups, levels, scales, mins) < _squared_error(
        groups, first_levels, first_scales, first_mins
    )
    np.copyto(first_levels, levels, where=better)
    return first_levels, np.where(better, scales, first_scales), np.where(better, mins, first_mins)


def _levels(groups: _Floats, scales: _Halves, mins: _Halves, top: int) -> _Floats:
    """The nearest level, 0 to `top`, of each weight."""
    levels = groups - mins.astype(np.float32)
    levels *= _inverse(scales)
    np.rint(levels, out=levels)
    return np.clip(levels, 0, top, out=levels)


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
