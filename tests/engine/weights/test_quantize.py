from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.kernels.layout import GROUP, dequantize, pack_matrix
from engine.weights import quantize as quantize_module
from engine.weights.quantize import MAX_QUANTIZED, quantize
from engine.weights.tensor_types import Quantized

Floats = NDArray[np.float32]
Make = Callable[[np.random.Generator, tuple[int, int]], Floats]

SUBNORMAL = 2.0**-18
"""What scales below float16's normal numbers add to an error: half their spacing, times 128 quants."""


def weights_of(matrix: Quantized) -> Floats:
    """What the quants stand for once they are packed, float32 [n, k]."""
    return dequantize(*pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits))


def from_min_to_max(values: Floats, top: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rounding to levels 0 to `top` from a group's smallest to its largest weight with float16 scale and min, written
    out: the weights [n, k] and the largest error of each that the rounding of level, min and scale explain [n, k]."""
    groups = values.reshape(len(values), -1, GROUP).astype(np.float64)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    scales = ((high - low) / top).astype(np.float16).astype(np.float64)
    mins = low.astype(np.float16).astype(np.float64)
    levels = np.rint(np.divide(groups - mins, scales, out=np.zeros_like(groups), where=scales > 0)).clip(0, top)
    bound = scales / 2 * (1 + 1e-6) + (np.abs(low) + (high - low)) * 2.0**-11 + SUBNORMAL * top / 128
    return (levels * scales + mins).reshape(values.shape), np.repeat(bound, GROUP, axis=2).reshape(values.shape)


def squared_errors(weights: NDArray[np.floating], values: Floats) -> NDArray[np.float64]:
    """By group, [n, k / 32]."""
    off = (weights.astype(np.float64) - values).reshape(len(values), -1, GROUP)
    total: NDArray[np.float64] = np.square(off).sum(axis=2)
    return total


def laplace(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return rng.laplace(0, 0.02, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return rng.normal(0, 0.02, shape).astype(np.float32)


def one_sided(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


def zeros(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.zeros(shape, np.float32)


def constant(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.full(shape, -0.7, np.float32)


def one_outlier(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    values = normal(rng, shape)
    values[:, 5::GROUP] = 300.0
    return values


def lone_outlier(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    values = np.zeros(shape, np.float32)
    values[:, 31::GROUP] = -2.0
    return values


def subnormal_scales(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return (normal(rng, shape) * np.exp2(rng.uniform(-20, 0, (shape[0], 1)))).astype(np.float32)


def far_below_float16(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return (normal(rng, shape) * np.float32(1e-38)).astype(np.float32)


def largest(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.where(rng.random(shape) < 0.5, MAX_QUANTIZED, -MAX_QUANTIZED).astype(np.float32)


def two_values(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.where(rng.random(shape) < 0.5, 0.25, -0.5).astype(np.float32)


KINDS = [
    normal, laplace, one_sided, zeros, constant, one_outlier, lone_outlier, subnormal_scales, far_below_float16,
    largest, two_values,
]  # fmt: skip
SHAPES = [(1, 32), (33, 96), (307, 576), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", KINDS)
def test_8_bits_are_off_by_at_most_half_a_scale(make: Make, shape: tuple[int, int]) -> None:
    values = make(np.random.default_rng(shape), shape)
    matrix = quantize(values, 8)
    assert matrix.mins is not None
    assert matrix.scales.shape == matrix.mins.shape == (shape[0], shape[1] // GROUP)
    groups = values.reshape(shape[0], -1, GROUP)
    ranges = groups.max(axis=2) - groups.min(axis=2)
    np.testing.assert_allclose(matrix.scales, ranges / 255, rtol=2.0**-11, atol=2.0**-25)
    weights = weights_of(matrix).astype(np.float64)
    _, bound = from_min_to_max(values, 255)
    assert (np.abs(weights - values) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("make", KINDS)
def test_4_bits_are_never_worse_than_rounding_from_min_to_max(make: Make, shape: tuple[int, int]) -> None:
    values = make(np.random.default_rng(shape), shape)
    matrix = quantize(values, 4)
    assert matrix.mins is not None
    assert int(matrix.quants.max()) <= 15
    plain, bound = from_min_to_max(values, 15)
    errors, plain_errors = squared_errors(weights_of(matrix), values), squared_errors(plain, values)
    assert (errors <= plain_errors * (1 + 1e-3) + 1e-12).all()
    # So the root mean square of a group obeys the bound of a single weight.
    assert (np.sqrt(errors / GROUP) <= bound[:, ::GROUP]).all()


def test_4_bits_are_better_than_rounding_from_min_to_max() -> None:
    """The refits are worth their time: 13 % of the squared error and more."""
    rng = np.random.default_rng(0)
    for make in (normal, laplace):
        values = make(rng, (128, 2048))
        ours = squared_errors(weights_of(quantize(values, 4)), values).sum()
        plain = squared_errors(from_min_to_max(values, 15)[0], values).sum()
        assert ours < 0.87 * plain, f"{make.__name__}: {ours / plain:.4f}"


def test_weights_on_a_grid_are_kept() -> None:
    rng = np.random.default_rng(1)
    levels = rng.integers(0, 16, (64, 96))
    levels.reshape(64, -1, GROUP)[..., :2] = 0, 15
    values = (levels * 0.125 - 0.75).astype(np.float32)
    np.testing.assert_array_equal(weights_of(quantize(values, 4)), values)
    values = (levels * 17 * 0.0078125 - 0.75).astype(np.float32)
    np.testing.assert_array_equal(weights_of(quantize(values, 8)), values)
    levels = rng.integers(0, 256, (64, 96))
    levels.reshape(64, -1, GROUP)[..., 6:8] = 0, 255
    values = (levels * 0.125 - 7.5).astype(np.float32)
    np.testing.assert_array_equal(weights_of(quantize(values, 8)), values)


def test_levels_of_a_groups_own_range_are_finer() -> None:
    """Than levels around zero: what a min is stored for."""
    values = normal(np.random.default_rng(3), (128, 2048))
    groups = values.reshape(128, -1, GROUP)
    scales = np.abs(groups).max(axis=2, keepdims=True) / 127
    around_zero = (np.rint(groups / scales) * scales).reshape(values.shape)
    ours = squared_errors(weights_of(quantize(values, 8)), values).sum()
    assert ours < 0.82 * squared_errors(around_zero, values).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_is_quantized_alone(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its neighbours nor the pieces that are computed together show in its bits."""
    values = laplace(np.random.default_rng(2), (65, 160))
    whole = quantize(values, bits)
    monkeypatch.setattr(quantize_module, "_PIECE", 7)
    pieces = quantize(values, bits)
    row = quantize(values[40:41, 64:96], bits)
    for field in ("quants", "scales", "mins"):
        every, again, alone = (getattr(matrix, field) for matrix in (whole, pieces, row))
        np.testing.assert_array_equal(every, again)
        width = 32 if field == "quants" else 1
        np.testing.assert_array_equal(every[40:41, 2 * width : 3 * width], alone)
