from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import FormatError, ModelError, UnsupportedModelError
from engine.kernels.layout import Correction, MatrixFormat, dequantize
from engine.models.spec import ModelInfo
from engine.weights import convert as convert_module
from engine.weights.checkpoint import open_checkpoint
from engine.weights.convert import convert, promote
from engine.weights.tensor_types import Quantized
from tests.tiny_gguf import TinyLlama

Weights = dict[str, NDArray[np.float32]]


def converted(path: Path) -> tuple[ModelInfo, dict[str, MatrixFormat | None], Weights]:
    """Everything that a checkpoint becomes: its info, the tensors' formats, the weights that they stand for."""
    with open_checkpoint(path) as file:
        info, tensors = convert(file)
        formats, weights = {}, {}
        for tensor in tensors:
            chunks = list(tensor.chunks())
            assert sum(chunk.nbytes for chunk in chunks) == tensor.nbytes
            formats[tensor.name] = tensor.format
            joined = np.concatenate([chunk.view(np.uint8) for chunk in chunks])
            weights[tensor.name] = (
                joined.view(np.float32) if tensor.format is None else dequantize(tensor.format, joined)
            )
    return info, formats, weights


def expected_weights(path: Path, info: ModelInfo) -> Weights:
    """The same from the gguf library's own reader and dequantization, with loops for the order of rows."""
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    spec = info.spec

    def half_split(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
        per_head = rows.reshape(heads, spec.head_dim, -1)
        return np.concatenate((per_head[:, 0::2], per_head[:, 1::2]), axis=1).reshape(rows.shape)

    made: Weights = {"embed": stored["token_embd.weight"], "final_norm": stored["output_norm.weight"]}
    if not spec.tie_embeddings:
        made["head"] = stored["output.weight"]
    for i in range(spec.num_layers):
        parts = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
        q, k, v, gate, up = (stored[f"blk.{i}.{part}.weight"] for part in parts)
        made[f"layers.{i}.qkv"] = np.concatenate((half_split(q, spec.num_heads), half_split(k, spec.num_kv_heads), v))
        blocks = [rows[at : at + 32] for at in range(0, len(gate), 32) for rows in (gate, up)]
        made[f"layers.{i}.gate_up"] = np.concatenate(blocks)
        names = {"attn_norm": "attn_norm", "ffn_norm": "ffn_norm", "o": "attn_output", "down": "ffn_down"}
        made |= {f"layers.{i}.{ours}": stored[f"blk.{i}.{theirs}.weight"] for ours, theirs in names.items()}
    return made


def assert_exact(path: Path) -> dict[str, MatrixFormat | None]:
    info, formats, weights = converted(path)
    expected = expected_weights(path, info)
    assert weights.keys() == expected.keys() == info.spec.tensor_shapes().keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values, err_msg=name)
    return formats


SHAPES: dict[str, dict[str, int]] = {
    "as the helper makes it": {},
    "three heads of 32, hidden 96": {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "ffn": 32, "vocab": 321},
    "hidden 576, as the default model": {
        "hidden": 576, "layers": 1, "heads": 9, "kv_heads": 3, "head_dim": 64, "ffn": 160, "vocab": 261
    },
}  # fmt: skip


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_exactly_the_checkpoint_s(tmp_path: Path, shape: str, quant: str) -> None:
    shapes = SHAPES[shape]
    model = TinyLlama(**shapes, quant=quant, tie=not shapes)
    formats = assert_exact(model.write(tmp_path / "m.gguf"))
    bits, correction = {"Q4_0": (4, 0), "Q4_1": (4, 1), "Q8_0": (8, 0)}[quant]
    assert {(fmt.bits, fmt.correction) for fmt in formats.values() if fmt is not None} == {(bits, correction)}


def test_small_chunks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = TinyLlama(heads=6, kv_heads=3, head_dim=48, ffn=352).write(tmp_path / "m.gguf")
    monkeypatch.setattr(convert_module, "CHUNK_VALUES", 1)  # one strip of 64 rows at a time, across heads and parts
    assert_exact(path)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_norms(tmp_path: Path, kind: str) -> None:
    model = TinyLlama()
    model.types |= {name: kind for name in model.types if name.endswith("norm.weight")}
    assert_exact(model.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("q", "v", "bits", "correction"),
    [
        ("Q4_0", "Q8_0", 8, Correction.ZERO_POINT),
        ("Q4_1", "Q8_0", 8, Correction.MIN),
        ("Q4_1", "Q4_0", 4, Correction.MIN),
        ("Q8_0", "Q4_1", 8, Correction.MIN),
        ("Q8_0", "Q4_0", 8, Correction.ZERO_POINT),
    ],
)
def test_merged_parts_of_different_types_keep_every_weight(
    tmp_path: Path, q: str, v: str, bits: int, correction: Correction
) -> None:
    model = TinyLlama()
    for i in range(2):
        model.types |= {f"blk.{i}.attn_{part}.weight": kind for part, kind in (("q", q), ("k", q), ("v", v))}
    formats = assert_exact(model.write(tmp_path / "m.gguf"))
    qkv = formats["layers.1.qkv"]
    assert qkv is not None
    assert (qkv.bits, qkv.correction) == (bits, correction)


def test_a_zero_point_without_an_exact_min_is_refused() -> None:
    scales = np.array([[1.0, 2.0], [1.0, 60000.0]], np.float16)
    matrix = Quantized(4, np.zeros((2, 64), np.uint8), scales, None)
    with pytest.raises(
        UnsupportedModelError, match=r"tensor x .* scale 6.* in row 1, group 1 has no exact float16 min"
    ):
        promote(matrix, MatrixFormat(2, 64, 4, Correction.MIN), "x")


def test_scales_too_small_for_normal_numbers_are_promoted_exactly() -> None:
    scales = np.array([[6e-8, -6e-5]], np.float16)
    quants = np.arange(64, dtype=np.uint8).reshape(1, 64) % 16
    wide = promote(Quantized(4, quants, scales, None), MatrixFormat(1, 64, 8, Correction.MIN), "x")
    assert wide.mins is not None
    np.testing.assert_array_equal(wide.mins.astype(np.float64), scales.astype(np.float64) * -8)
    np.testing.assert_array_equal(wide.quants, quants)


def delete(tensor: str) -> Callable[[TinyLlama], None]:
    def change(model: TinyLlama) -> None:
        del model.tensors[tensor]

    return change


def reshape(tensor: str, *shape: int) -> Callable[[TinyLlama], None]:
    return lambda model: model.tensors.update({tensor: np.ones(shape, np.float32)})


def retype(tensor: str, kind: str) -> Callable[[TinyLlama], None]:
    return lambda model: model.types.update({tensor: kind})


def extra(tensor: str) -> Callable[[TinyLlama], None]:
    def change(model: TinyLlama) -> None:
        model.tensors[tensor] = np.ones(64, np.float32)
        model.types[tensor] = "F32"

    return change


def metadata(key: str, value: object) -> Callable[[TinyLlama], None]:
    return lambda model: model.metadata.update({key: value})


def poison(tensor: str) -> Callable[[TinyLlama], None]:
    def change(model: TinyLlama) -> None:
        model.tensors[tensor][..., 3] = np.nan

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (delete("blk.1.ffn_up.weight"), FormatError, r"tensor blk.1.ffn_up.weight \[96, 64\] is missing"),
        (
            reshape("blk.0.attn_k.weight", 64, 64),
            FormatError,
            r"tensor blk.0.attn_k.weight: expected shape \[32, 64\], found \[64, 64\]",
        ),
        (
            reshape("blk.0.attn_norm.weight", 1, 64),
            FormatError,
            r"tensor blk.0.attn_norm.weight: expected shape \[64\], found \[1, 64\]",
        ),
        (
            retype("blk.1.ffn_down.weight", "MXFP4"),
            UnsupportedModelError,
            r"tensor blk.1.ffn_down.weight: type MXFP4 is not supported for matrices \(only F32, .*, Q8_0 are\)",
        ),
        (
            retype("output_norm.weight", "Q8_0"),
            UnsupportedModelError,
            r"tensor output_norm.weight: type Q8_0 is not supported for vectors \(only F32, F16, BF16 are\)",
        ),
        (
            extra("blk.0.attn_q.bias"),
            UnsupportedModelError,
            "llama: tensors that are not supported: blk.0.attn_q.bias",
        ),
        (metadata("general.architecture", "mamba"), UnsupportedModelError, "must be one of llama, .* has 'mamba'"),
        (metadata("split.count", 4), UnsupportedModelError, r"split over several files .* \(split.count 4\)"),
        (poison("blk.0.ffn_gate.weight"), FormatError, "tensor blk.0.ffn_gate.weight holds a value that is not finite"),
        (poison("output_norm.weight"), FormatError, "tensor output_norm.weight holds a value that is not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the library quantizes the poisoned weights
def test_what_cannot_be_used_is_named(
    tmp_path: Path, change: Callable[[TinyLlama], None], error: type[ModelError], message: str
) -> None:
    model = TinyLlama()
    change(model)
    path = model.write(tmp_path / "m.gguf")
    with pytest.raises(error, match=message):
        converted(path)


def test_a_vocabulary_of_another_size_than_the_embedding(tmp_path: Path) -> None:
    model = TinyLlama()
    other = TinyLlama(vocab=320)
    model.metadata |= {key: value for key, value in other.metadata.items() if key.startswith("tokenizer.")}
    with pytest.raises(FormatError, match=r"the tokenizer has 320 tokens, the embedding 307 rows"):
        converted(model.write(tmp_path / "m.gguf"))
