"""The twin's float32 primitives against exact arithmetic."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from engine.kernels.batch import Float32
from engine.kernels.reference_math import exp, fma, sum_lanes
from tests.engine.kernels.steps import exact_fma

moderate = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-9)


@given(a=moderate, b=moderate, c=moderate)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    x, y, z = (np.array([value], np.float32) for value in (a, b, c))
    assert fma(x, y, z)[0] == exact_fma(x[0], y[0], z[0])


def test_fma_rounds_once_where_float64_only_sees_a_tie() -> None:
    """c plus half a unit in its last place, plus or minus less than float64 can hold beside it."""
    a = np.float32(1) + np.arange(1, 4000, dtype=np.float32) * np.float32(2.0**-23)
    b = np.float32(1) / a
    excess = a.astype(np.float64) * b - 1
    close = (np.abs(excess) < 2.0**-29) & (excess != 0)
    assert (excess[close] > 0).any()
    assert (excess[close] < 0).any()
    for c in (1.0, 1 + 2.0**-23, -1.0, -1 - 2.0**-23, 1.5):
        x, y = a[close] * np.float32(np.copysign(2.0**-24, c)), b[close]
        z = np.full_like(x, c)
        assert (x.astype(np.float64) * y + z == c + np.copysign(2.0**-24, c)).all()  # rounded once, it is a tie
        expected = [exact_fma(*operands) for operands in zip(x, y, z, strict=True)]
        assert fma(x, y, z).tolist() == expected


@given(npst.arrays(np.float32, 32, elements=st.floats(-90, 90, width=32)))
def test_exp_is_within_two_units_in_the_last_place(x: Float32) -> None:
    for value, result in zip(x, exp(x), strict=True):
        if value < -87:
            assert result == 0
        else:
            exact = math.exp(min(float(value), 88.0))
            assert abs(float(result) - exact) <= 2 * float(np.spacing(np.float32(exact)))


def test_exp_of_zero_and_of_minus_infinity_are_exact() -> None:
    assert exp(np.array([0, -0.0, -np.inf], np.float32)).tolist() == [1, 1, 0]


def test_lanes_are_summed_by_halves() -> None:
    lanes = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    for row, total in zip(lanes, sum_lanes(lanes), strict=True):
        eight = [row[i] + row[i + 8] for i in range(8)]
        four = [eight[i] + eight[i + 4] for i in range(4)]
        assert total == (four[0] + four[2]) + (four[1] + four[3])
