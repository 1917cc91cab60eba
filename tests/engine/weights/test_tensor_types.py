from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from engine.kernels.layout import GROUP, Correction, dequantize, from_bf16, pack_matrix, to_bf16
from engine.weights.tensor_types import FLOAT_TYPES, QUANTIZED_TYPES, Quantized
from tests.tiny_gguf import stored_as

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WITH_MINS = ("Q4_K", "Q5_K")
FLOAT16_BYTES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip
"""Where a block holds its float16 scale, and its min."""

assert FLOAT16_BYTES.keys() == QUANTIZED_TYPES.keys()


def library(raw: Bytes, kind: str) -> Floats:
    """gguf's own dequantization, float32 [n, k]."""
    values: Floats = gguf.quants.dequantize(raw, Kind[kind])
    return values


def ours(matrix: Quantized) -> Floats:
    """The weights as they are packed, float32 [n, k]."""
    return dequantize(*pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits))


def random_blocks(rng: np.random.Generator, kind: str, rows: int, k: int) -> Bytes:
    """Raw rows of random bytes, which reach what no quantizer writes (int8 -128, 6-bit scales of any size); the
    float16 values are of either sign and from far below the normal ones to 512."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = rng.integers(0, 256, (rows, k // block, size), np.uint8)
    for offset in FLOAT16_BYTES[kind]:
        scales = rng.choice([-1, 1], raw.shape[:2]) * np.exp2(rng.uniform(-26, 9, raw.shape[:2]))
        write_float16(raw, offset, scales)
    return raw.reshape(rows, -1)


def write_float16(blocks: Bytes, offset: int, values: NDArray[np.floating]) -> None:
    blocks[..., offset : offset + 2] = values.astype("<f2")[..., None].view(np.uint8)


def without(raw: Bytes, kind: str, offset: int) -> Bytes:
    """The same rows with the float16 at `offset` of each block set to 0."""
    blocks = raw.copy().reshape(len(raw), -1, gguf.GGML_QUANT_SIZES[Kind[kind]][1])
    blocks[..., offset : offset + 2] = 0
    return blocks.reshape(raw.shape)


def check_bound(raw: Bytes, kind: str) -> None:
    """Decode and pack rows, and compare with the library within what the type's decoder promises."""
    matrix = QUANTIZED_TYPES[kind].decode(raw)
    assert matrix.bits == QUANTIZED_TYPES[kind].bits
    assert (matrix.mins is not None) == (QUANTIZED_TYPES[kind].correction is Correction.MIN)
    expected, weights = library(raw, kind), ours(matrix)
    assert weights.shape == expected.shape
    if kind in EXACT:
        np.testing.assert_array_equal(weights, expected)
        return
    off = np.abs(weights.astype(np.float64) - expected)
    bound = mins_bound(raw, kind, matrix) if kind in WITH_MINS else q6_k_bound(raw, matrix)
    worst = np.unravel_index(np.argmax(off - bound), off.shape)
    assert (off <= bound).all(), f"{worst}: {expected[worst]} became {weights[worst]}, bound {bound[worst]}"


def mins_bound(raw: Bytes, kind: str, matrix: Quantized) -> NDArray[np.float64]:
    scaled = np.abs(library(without(raw, kind, 2), kind)).astype(np.float64)  # |d * scale * quant|
    mins = np.abs(library(without(raw, kind, 0), kind)).astype(np.float64)  # |dmin * min|
    # 2^-23: the float32 arithmetic of both sides.
    bound: NDArray[np.float64] = (scaled + mins) * (2.0**-11 + 2.0**-23) + 2.0**-25 * (matrix.quants + 1.0)
    return bound


def q6_k_bound(raw: Bytes, matrix: Quantized) -> NDArray[np.float64]:
    """And that the scale is a quarter of the group's larger step."""
    ones = raw.copy().reshape(len(raw), -1, 210)
    ones[..., :128], ones[..., 128:192] = 0x11, 0xAA  # quant 33 everywhere: a weight is its step
    steps = library(ones.reshape(raw.shape), "Q6_K").astype(np.float64)
    per_group = steps.reshape(len(raw), -1, 2, 16)
    larger = np.abs(per_group).max(axis=(2, 3))
    np.testing.assert_allclose(np.abs(matrix.scales.astype(np.float64)), larger / 4, rtol=2.0**-11, atol=2.0**-25)
    weights = library(raw, "Q6_K").astype(np.float64)
    is_larger = np.abs(steps) == np.repeat(larger, GROUP, axis=1)
    bound = np.abs(np.repeat(matrix.scales.astype(np.float64), GROUP, axis=1)) / 2
    bound[is_larger] = np.abs(weights[is_larger]) * 2.0**-11
    first, second = per_group[:, :, 0, 0], per_group[:, :, 1, 0]
    opposite = np.repeat((first == -second) & (first != 0), GROUP, axis=1)
    lowest = np.isclose(weights, -32 * steps) & opposite
    bound[lowest] = np.repeat(larger, GROUP, axis=1)[lowest] / 4 * (1 + 2.0**-3)
    return bound + 2.0**-18


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED_TYPES if not kind.endswith("_K")])
@pytest.mark.parametrize("shape", [(1, 32), (31, 96), (33, 576), (64, 64), (307, 576)], ids=str)
def test_blocks_of_32(kind: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    check_bound(random_blocks(rng, kind, *shape), kind)
    check_bound(gguf.quants.quantize(rng.standard_normal(shape, np.float32), Kind[kind]), kind)


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED_TYPES if kind.endswith("_K")])
@pytest.mark.parametrize("shape", [(1, 256), (33, 512), (96, 256), (307, 768)], ids=str)
def test_blocks_of_256(kind: str, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    check_bound(random_blocks(rng, kind, *shape), kind)
    original = rng.standard_normal(shape, np.float32)
    written = stored_as(original, kind).view(np.uint8)
    check_bound(written, kind)
    # Our rounding is small beside the one by which the checkpoint was made.
    values, weights = library(written, kind), ours(QUANTIZED_TYPES[kind].decode(written))
    assert np.linalg.norm(weights - values) <= 0.25 * np.linalg.norm(values - original)


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_random_blocks_reach_every_value(kind: str) -> None:
    """So the bounds were tested on all quants of a type, and on all its 6-bit scales and mins."""
    matrix = QUANTIZED_TYPES[kind].decode(random_blocks(np.random.default_rng(5), kind, 64, 2048))
    seen = set(np.unique(matrix.quants).tolist())
    stored = {"Q5_0": range(112, 144), "Q5_1": range(32), "Q5_K": range(32)}
    assert seen == set(stored.get(kind, range(1 << matrix.bits)))
    if kind in WITH_MINS:
        raw = random_blocks(np.random.default_rng(6), kind, 64, 2048)
        write_float16(raw.reshape(64, 8, -1), 0, np.ones((64, 8)))
        write_float16(raw.reshape(64, 8, -1), 2, np.ones((64, 8)))
        matrix = QUANTIZED_TYPES[kind].decode(raw)
        assert matrix.mins is not None
        assert set(np.unique(matrix.scales).tolist()) == set(range(64))
        assert set(np.unique(-matrix.mins).tolist()) == set(range(64))
        np.testing.assert_array_equal(ours(matrix), library(raw, kind))  # small integers: nothing is rounded


def test_q6_k_with_equal_steps_is_exact() -> None:
    rng = np.random.default_rng(7)
    raw = random_blocks(rng, "Q6_K", 32, 512)
    blocks = raw.reshape(32, 2, 210)
    write_float16(blocks, 208, np.full((32, 2), 2.0**-6))
    blocks[..., 192:208] = rng.integers(0, 256, (32, 2, 8, 1), np.uint8).repeat(2, axis=3).reshape(32, 2, 16)
    np.testing.assert_array_equal(ours(QUANTIZED_TYPES["Q6_K"].decode(raw)), library(raw, "Q6_K"))


def test_q6_k_with_opposite_steps() -> None:
    """The one quant that 8 bits cannot hold becomes its neighbour; all others are exact."""
    raw = random_blocks(np.random.default_rng(8), "Q6_K", 32, 512)
    blocks = raw.reshape(32, 2, 210)
    write_float16(blocks, 208, np.full((32, 2), 0.25))
    blocks[..., 192:208] = np.array([16, 240] * 8, np.uint8)  # steps 4 and -4, the new scale is 1
    expected = library(raw, "Q6_K")
    weights = ours(QUANTIZED_TYPES["Q6_K"].decode(raw))
    assert (expected == 128).any()
    np.testing.assert_array_equal(weights, np.minimum(expected, 127))


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_blocks_of_zeros(kind: str) -> None:
    raw = np.zeros((3, 512 // gguf.GGML_QUANT_SIZES[Kind[kind]][0] * gguf.GGML_QUANT_SIZES[Kind[kind]][1]), np.uint8)
    np.testing.assert_array_equal(ours(QUANTIZED_TYPES[kind].decode(raw)), 0)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("value", [np.inf, np.nan, 60000.0])
def test_products_beyond_float16_are_not_finite(kind: str, value: float) -> None:
    """Which is how a conversion finds and refuses them; and nothing warns on the way there."""
    raw = random_blocks(np.random.default_rng(9), kind, 4, 256)
    write_float16(raw.reshape(4, 1, -1)[2], FLOAT16_BYTES[kind][0], np.array([value]))
    finite = np.isfinite(QUANTIZED_TYPES[kind].decode(raw).scales).all(axis=1)
    np.testing.assert_array_equal(finite, [True, True, False, True])


@pytest.mark.parametrize("kind", FLOAT_TYPES)
def test_vectors_become_float32_exactly(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal(97, np.float32)
    raw = gguf.quants.quantize(values, Kind[kind])
    read = FLOAT_TYPES[kind](raw.view(np.uint8).reshape(1, -1))[0]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, gguf.quants.dequantize(raw, Kind[kind]))


def test_every_bit_pattern_of_16_bit_floats() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    raw = patterns.astype("<u2").view(np.uint8).reshape(256, -1)
    np.testing.assert_array_equal(FLOAT_TYPES["F16"](raw).reshape(-1), patterns.view(np.float16).astype(np.float32))
    values = FLOAT_TYPES["BF16"](raw).reshape(-1)
    np.testing.assert_array_equal(values, library(raw, "BF16").reshape(-1))
    # All but NaNs, which become one, survive a matrix of bfloat16.
    real = ~np.isnan(values)
    np.testing.assert_array_equal(to_bf16(values)[real], patterns[real])
    np.testing.assert_array_equal(from_bf16(to_bf16(values))[real], values[real])
