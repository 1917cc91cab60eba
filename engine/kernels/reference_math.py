"""Float32 primitives of the numpy twin, rounded as the kernels round them: every result is one defined value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.kernels.batch import Float32
from engine.kernels.layout import LANES

_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)

_GELU_COEFFICIENTS = tuple(
    np.float32(c)
    for c in (
        2.57726618e-11, -2.91921154e-09, 1.45010645e-07, -4.18347599e-06, 7.84834629e-05, -0.001018952, 0.00952053629,
        -0.0658775344, 0.398652941,
    )
)  # fmt: skip

_WHOLE = np.float32(1.5 * 2**23)
"""Beside it a float32 has no bits left for fractions: adding it rounds to a whole number, ties to even."""


def fma(a: Float32 | np.float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    """a * b + c, rounded once to float32, for normal results; broadcasts.

    The product of two float32 is exact in float64. Their sum with c is rounded to float64 first, and rounding that to
    float32 is right except where the float64 lies exactly between two float32 and was not exact itself.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total: NDArray[np.float64] = np.add(product, c)
    rounded = total.astype(np.float32)
    between = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == 0x10000000
    if between.any():
        p, t = np.broadcast_to(product, total.shape)[between], total[between]
        addend = np.broadcast_to(np.asarray(c, np.float64), total.shape)[between]
        virtual = t - p  # what was added to p; the error of t follows (Knuth's two-sum)
        error = (p - (t - virtual)) + (addend - virtual)
        rounded[between] = np.where(error == 0, t, np.nextafter(t, np.copysign(np.inf, error)))
    return rounded


def exp(x: Float32) -> Float32:
    """e**x within 2 ulp for x <= 88 (and e**88 beyond); 0 below -87. The kernels' own exponential.

    Range reduction by ln 2 in two parts and a polynomial of degree 6 (Cephes expf, Moshier).
    """
    clamped = np.minimum(np.maximum(x, np.float32(-87)), np.float32(88))
    n = fma(clamped, np.float32(1.44269504088896341), _WHOLE) - _WHOLE
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, clamped))
    p = np.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = fma(p, r, coefficient)
    y = fma(p, r * r, r) + np.float32(1)
    return np.where(x < np.float32(-87), np.float32(0), np.ldexp(y, n.astype(np.int32)))


def silu(x: Float32) -> Float32:
    """x / (1 + e**-x)."""
    result: Float32 = x / (1 + exp(-x))
    return result


def gelu_tanh(x: Float32) -> Float32:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))), which is x / (1 + e**-2u) where tanh is taken of u
    (Hendrycks and Gimpel, 2016)."""
    inner = fma(x * x * x, np.float32(0.044715), x)
    result: Float32 = x / (1 + exp(inner * np.float32(-1.59576912160573)))
    return result


def gelu(x: Float32) -> Float32:
    """x times the share of the normal distribution that lies below x, within 7e-5 for |x| <= 12: an odd polynomial of
    x, cut off at 4.6, fitted so that x times its error is smallest."""
    near = np.minimum(np.maximum(x, np.float32(-4.6)), np.float32(4.6))
    square = near * near
    q = np.full_like(near, _GELU_COEFFICIENTS[0])
    for coefficient in _GELU_COEFFICIENTS[1:]:
        q = fma(q, square, coefficient)
    result: Float32 = x * fma(q, near, np.float32(0.5))
    return result


def softcapped(x: Float32, limit: float) -> Float32:
    """limit * tanh(x / limit), and x itself for a limit of 0."""
    if limit == 0:
        return x
    cap, one, two = np.float32(limit), np.float32(1), np.float32(2)
    result: Float32 = cap * (one - two / (exp(two * x / cap) + one))
    return result


def sum_lanes(lanes: Float32) -> Float32:
    """Sum the last axis, 16 lanes, by halves: lane i and i + 8, then i + 4, i + 2, i + 1."""
    width = LANES // 2
    while width:
        lanes = lanes[..., :width] + lanes[..., width:]
        width //= 2
    return lanes[..., 0]
