from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from engine.kernels.layout import Correction, dequantize, pack_matrix
from engine.weights.gguf_types import MATRIX_TYPES, VECTOR_TYPES


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 32), (31, 96), (33, 576), (64, 64), (307, 64)], ids=str)
def test_packed_weights_are_the_format_s_own(kind: GGMLQuantizationType, shape: tuple[int, int]) -> None:
    raw = gguf.quants.quantize(np.random.default_rng(shape).standard_normal(shape, np.float32), kind)
    matrix = MATRIX_TYPES[kind].decode(raw)
    assert matrix.bits == MATRIX_TYPES[kind].bits
    assert (matrix.mins is not None) == (MATRIX_TYPES[kind].correction is Correction.MIN)
    fmt, packed = pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits)
    np.testing.assert_array_equal(dequantize(fmt, packed), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=lambda kind: kind.name)
def test_every_quant_value_survives(kind: GGMLQuantizationType) -> None:
    # Random bytes reach quants that a quantizer never writes, such as int8 -128; scales and mins are set finite.
    _, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(5).integers(0, 256, (64, 8 * size), np.uint8)
    blocks = raw.reshape(64, 8, size)
    blocks[..., :2] = np.frombuffer(np.float16(0.37).tobytes(), np.uint8)
    if MATRIX_TYPES[kind].correction:
        blocks[..., 2:4] = np.frombuffer(np.float16(-1.1).tobytes(), np.uint8)
    matrix = MATRIX_TYPES[kind].decode(raw)
    assert set(np.unique(matrix.quants)) == set(range(1 << matrix.bits))
    fmt, packed = pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits)
    np.testing.assert_array_equal(dequantize(fmt, packed), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", VECTOR_TYPES, ids=lambda kind: kind.name)
def test_vectors_become_float32_exactly(kind: GGMLQuantizationType) -> None:
    values = np.random.default_rng(0).standard_normal(97, np.float32)
    raw = gguf.quants.quantize(values, kind)
    read = VECTOR_TYPES[kind](raw.view(np.uint8))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, gguf.quants.dequantize(raw, kind))
