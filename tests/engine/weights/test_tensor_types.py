from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from engine.kernels.layout import Correction, dequantize, pack_matrix
from engine.weights.tensor_types import FLOAT_TYPES, QUANTIZED_TYPES


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
@pytest.mark.parametrize("shape", [(1, 32), (31, 96), (33, 576), (64, 64), (307, 64)], ids=str)
def test_packed_weights_are_the_format_s_own(kind: str, shape: tuple[int, int]) -> None:
    raw = gguf.quants.quantize(np.random.default_rng(shape).standard_normal(shape, np.float32), Kind[kind])
    matrix = QUANTIZED_TYPES[kind].decode(raw)
    assert matrix.bits == QUANTIZED_TYPES[kind].bits
    assert (matrix.mins is not None) == (QUANTIZED_TYPES[kind].correction is Correction.MIN)
    fmt, packed = pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits)
    np.testing.assert_array_equal(dequantize(fmt, packed), gguf.quants.dequantize(raw, Kind[kind]))


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_every_quant_value_survives(kind: str) -> None:
    # Random bytes reach quants that a quantizer never writes, such as int8 -128; scales and mins are set finite.
    _, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(5).integers(0, 256, (64, 8 * size), np.uint8)
    blocks = raw.reshape(64, 8, size)
    blocks[..., :2] = np.frombuffer(np.float16(0.37).tobytes(), np.uint8)
    if QUANTIZED_TYPES[kind].correction:
        blocks[..., 2:4] = np.frombuffer(np.float16(-1.1).tobytes(), np.uint8)
    matrix = QUANTIZED_TYPES[kind].decode(raw)
    assert set(np.unique(matrix.quants)) == set(range(1 << matrix.bits))
    fmt, packed = pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits)
    np.testing.assert_array_equal(dequantize(fmt, packed), gguf.quants.dequantize(raw, Kind[kind]))


@pytest.mark.parametrize("kind", FLOAT_TYPES)
def test_vectors_become_float32_exactly(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal(97, np.float32)
    raw = gguf.quants.quantize(values, Kind[kind])
    read = FLOAT_TYPES[kind](raw.view(np.uint8).reshape(1, -1))[0]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, gguf.quants.dequantize(raw, Kind[kind]))
