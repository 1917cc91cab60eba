from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as npst

from engine.kernels.layout import (
    Correction,
    MatrixFormat,
    dequantize,
    from_bf16,
    pack_bf16,
    pack_matrix,
    to_bf16,
    unpack_bf16,
    unpack_matrix,
)

SHAPES = [(1, 32), (31, 32), (64, 64), (65, 96), (307, 576)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_mins", [False, True])
def test_quants_come_back(n: int, k: int, bits: int, has_mins: bool) -> None:
    rng = np.random.default_rng(n * k + bits)
    quants = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
    scales = rng.standard_normal((n, k // 32)).astype(np.float16)
    mins = rng.standard_normal((n, k // 32)).astype(np.float16) if has_mins else None
    fmt, packed = pack_matrix(quants, scales, mins, bits=bits)
    assert packed.nbytes == fmt.nbytes
    got = unpack_matrix(fmt, packed)
    np.testing.assert_array_equal(got[0], quants)
    np.testing.assert_array_equal(got[1], scales)
    if mins is None:
        assert got[2] is None
    else:
        np.testing.assert_array_equal(got[2], mins)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bf16_comes_back(n: int, k: int) -> None:
    values = np.random.default_rng(n + k).integers(0, 1 << 16, (n, k)).astype(np.uint16)
    fmt, packed = pack_bf16(values)
    assert packed.nbytes == fmt.nbytes == -(-n // 64) * 64 * k * 2
    np.testing.assert_array_equal(unpack_bf16(fmt, packed), values)
    np.testing.assert_array_equal(dequantize(fmt, packed).view(np.uint32), values.astype(np.uint32) << 16)


def test_a_row_of_a_bf16_cell_holds_two_inputs_of_every_output() -> None:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    _, packed = pack_bf16(values)
    rows = packed.view("<u2").reshape(2, 2, 16, 32, 2)  # [group, half, row, lane, input]
    assert rows[1, 1, 3, 5].tolist() == [values[37, 38], values[37, 39]]


def test_bf16_rounds_to_the_nearest_and_ties_to_even() -> None:
    def of(bits: int) -> np.float32:
        value: np.float32 = np.array([bits], np.uint32).view(np.float32)[0]
        return value

    cases = {
        0x3F800000: 0x3F80,  # exact
        0x3F807FFF: 0x3F80,
        0x3F808000: 0x3F80,  # a tie, down to even
        0x3F818000: 0x3F82,  # a tie, up to even
        0x3F808001: 0x3F81,
        0xBF808001: 0xBF81,
        0x7F7FFFFF: 0x7F80,  # past the largest: infinite
        0x80000000: 0x8000,  # -0
        0x00008001: 0x0001,  # subnormal
        0xFFFFFFFF: 0x7FC0,  # NaN stays one
    }
    values = np.array([of(bits) for bits in cases], np.float32)
    assert [hex(got) for got in to_bf16(values)] == [hex(want) for want in cases.values()]
    exact = np.arange(0, 0x7F80, dtype=np.uint16)
    np.testing.assert_array_equal(to_bf16(from_bf16(exact)), exact)


@given(npst.arrays(np.uint32, 16))
def test_bf16_takes_the_nearest_value_and_an_even_one_between_two(bits: np.ndarray) -> None:
    x = bits.view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(0))
    rounded = from_bf16(to_bf16(x))
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    low = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # toward zero
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)  # the next one away from zero
    # After the largest finite value comes infinity; rounding decides as if that were the number 2**128.
    up = np.where(np.isinf(high), 2.0**128 * np.sign(x.astype(np.float64)), high.astype(np.float64))
    to_low, to_high = np.abs(x - low.astype(np.float64)), np.abs(up - x)
    even = (low.view(np.uint32) >> 16 & 1) == 0
    expected = np.where((to_low < to_high) | ((to_low == to_high) & even), low, high)
    assert (rounded == expected).all()


def test_bf16_keeps_what_is_not_a_number() -> None:
    x = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000], np.uint32).view(np.float32)
    rounded = from_bf16(to_bf16(x))
    assert np.isnan(rounded[:3]).all()
    assert (rounded[3:] == [np.inf, -np.inf]).all()


@pytest.mark.parametrize(
    ("n", "k", "bits", "correction", "problem"),
    [
        (0, 32, 4, Correction.MIN, "inputs must be a positive multiple of 32"),
        (1, 48, 4, Correction.MIN, "inputs must be a positive multiple of 32"),
        (1, 32, 5, Correction.MIN, "bits must be 4, 8 or 16, got 5"),
        (1, 32, 16, Correction.MIN, "16 bits do not go with MIN"),
        (1, 32, 8, Correction.NONE, "8 bits do not go with NONE"),
    ],
)
def test_impossible_formats(n: int, k: int, bits: int, correction: Correction, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        MatrixFormat(n, k, bits, correction)


def test_wrong_size() -> None:
    fmt, packed = pack_bf16(np.zeros((3, 32), np.uint16))
    with pytest.raises(ValueError, match="expected 4096 bytes, got 4095"):
        unpack_bf16(fmt, packed[:-1])
