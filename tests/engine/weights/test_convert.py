from __future__ import annotations

import re
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import ConfigError, FormatError, ModelError, UnsupportedModelError
from engine.kernels.layout import Correction, MatrixFormat, dequantize, pack_matrix
from engine.models.spec import ModelInfo
from engine.weights import convert as convert_module
from engine.weights.checkpoint import open_checkpoint
from engine.weights.convert import convert, promote
from engine.weights.quantize import quantize
from engine.weights.tensor_types import FLOAT_TYPES, QUANTIZED_TYPES, Quantized
from tests.tiny_gguf import TinyLlama

Floats = NDArray[np.float32]
Weights = dict[str, Floats]
Formats = dict[str, MatrixFormat | None]
BF16 = gguf.GGMLQuantizationType.BF16


def converted(path: Path, quantization: str | None = None) -> tuple[ModelInfo, Formats, Weights]:
    """Everything that a checkpoint becomes: its info, the tensors' formats, the weights that they stand for."""
    with open_checkpoint(path) as file:
        info, tensors = convert(file, quantization=quantization)
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


def stored_weights(path: Path) -> Weights:
    """Each tensor of the checkpoint, by the gguf library's own reader and dequantization."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


def carried_weights(path: Path, float_bits: Callable[[str], int] = lambda name: 16) -> Weights:
    """What must be left of each tensor of the checkpoint: the library's values for vectors and the types that are
    exact, the library's own rounding to bfloat16 of float matrices (or their quantization to `float_bits` of the
    tensor's name), the decoder's rounding of K-quants (whose bounds have tests of their own)."""
    made = stored_weights(path)
    for tensor in gguf.GGUFReader(path).tensors:
        kind, values = tensor.tensor_type.name, made[tensor.name]
        if values.ndim == 1:
            continue
        if kind.endswith("_K"):
            made[tensor.name] = quants_of(QUANTIZED_TYPES[kind].decode(tensor.data))
        elif kind in FLOAT_TYPES:
            bits = float_bits(tensor.name)
            made[tensor.name] = (
                gguf.quants.dequantize(gguf.quants.quantize(values, BF16), BF16)
                if bits == 16
                else quants_of(quantize(values, bits))
            )
    return made


def quants_of(matrix: Quantized) -> Floats:
    return dequantize(*pack_matrix(matrix.quants, matrix.scales, matrix.mins, bits=matrix.bits))


def put_together(stored: Weights, info: ModelInfo) -> Weights:
    """Our tensors from the checkpoint's, with loops for the order of rows."""
    spec = info.spec

    def half_split(rows: Floats, heads: int) -> Floats:
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


def assert_carried(
    path: Path, quantization: str | None = None, float_bits: Callable[[str], int] = lambda name: 16
) -> tuple[ModelInfo, Formats]:
    """Every weight is the checkpoint's: exactly, after the one rounding that its type has."""
    info, formats, weights = converted(path, quantization)
    expected = put_together(carried_weights(path, float_bits), info)
    assert weights.keys() == expected.keys() == info.spec.tensor_shapes().keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name], values, err_msg=name)
    for name, values in put_together(stored_weights(path), info).items():
        assert np.linalg.norm(weights[name] - values) <= 0.08 * np.linalg.norm(values), name
    return info, formats


def kinds_of(formats: Formats) -> set[tuple[int, Correction]]:
    """Bits and correction of all matrices."""
    return {(fmt.bits, fmt.correction) for fmt in formats.values() if fmt is not None}


SHAPES: dict[str, dict[str, Any]] = {
    "as the helper makes it": {},
    "three heads of 32, hidden 96": {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "ffn": 32, "vocab": 321},
    "hidden 576, as the default model": {
        "hidden": 576, "layers": 1, "heads": 9, "kv_heads": 3, "head_dim": 64, "ffn": 160, "vocab": 261
    },
}  # fmt: skip
WIDE_SHAPES: dict[str, dict[str, Any]] = {
    "hidden 256": {"hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 32, "ffn": 512, "vocab": 277},
    "hidden 512, one KV head": {
        "hidden": 512, "layers": 1, "heads": 4, "kv_heads": 1, "head_dim": 64, "ffn": 256, "vocab": 307
    },
    "hidden 768, heads of 48": {
        "hidden": 768, "layers": 1, "heads": 16, "kv_heads": 16, "head_dim": 48, "ffn": 256, "vocab": 261
    },
}  # fmt: skip
FORMATS = {
    "F32": (16, Correction.NONE),
    "F16": (16, Correction.NONE),
    "BF16": (16, Correction.NONE),
    "Q4_0": (4, Correction.ZERO_POINT),
    "Q4_1": (4, Correction.MIN),
    "Q5_0": (8, Correction.ZERO_POINT),
    "Q5_1": (8, Correction.MIN),
    "Q8_0": (8, Correction.ZERO_POINT),
    "Q4_K": (4, Correction.MIN),
    "Q5_K": (8, Correction.MIN),
    "Q6_K": (8, Correction.ZERO_POINT),
}
assert FORMATS.keys() == FLOAT_TYPES.keys() | QUANTIZED_TYPES.keys()


@pytest.mark.parametrize(
    ("quant", "shape"),
    [(quant, shape) for quant in FORMATS for shape in (WIDE_SHAPES if quant.endswith("_K") else SHAPES)],
)
def test_every_weight_is_the_checkpoint_s(tmp_path: Path, quant: str, shape: str) -> None:
    shapes = (SHAPES | WIDE_SHAPES)[shape]
    model = TinyLlama(**shapes, quant=quant, tie=not shapes)
    info, formats = assert_carried(model.write(tmp_path / "m.gguf"))
    assert kinds_of(formats) == {FORMATS[quant]}
    assert info.checkpoint_format == f"{quant} GGUF"


def test_bfloat16_values_are_exact_in_every_float_type(tmp_path: Path) -> None:
    """What float16 and float32 files hold of a bfloat16 model is what comes out."""
    for kind in ("F32", "F16", "BF16"):
        model = TinyLlama(quant=kind)
        for name, values in model.tensors.items():
            model.tensors[name] = gguf.quants.dequantize(gguf.quants.quantize(values.astype(np.float16), BF16), BF16)
            model.tensors[name][np.abs(model.tensors[name]) < 2.0**-14] = 0  # finer there than float16
        path = model.write(tmp_path / f"{kind}.gguf")
        info, _, weights = converted(path)
        for name, values in put_together(model.tensors, info).items():
            np.testing.assert_array_equal(weights[name], values, err_msg=f"{kind} {name}")


MIXES: dict[str, tuple[str, dict[str, str], dict[str, tuple[int, Correction]]]] = {
    # As llama.cpp mixes types: what most tensors are, the exceptions, and what some of ours must become.
    "Q4_K_M": (
        "Q4_K",
        {"token_embd.*": "Q6_K", "blk.0.attn_v.*": "Q6_K", "blk.0.ffn_down.*": "Q6_K"},
        {
            "embed": (8, Correction.ZERO_POINT),
            "layers.0.qkv": (8, Correction.MIN),
            "layers.0.down": (8, Correction.ZERO_POINT),
            "layers.1.qkv": (4, Correction.MIN),
            "layers.1.down": (4, Correction.MIN),
        },
    ),
    "Q5_K_M": (
        "Q5_K",
        {"token_embd.*": "Q6_K", "blk.1.attn_v.*": "Q6_K", "blk.1.ffn_down.*": "Q6_K"},
        {"layers.0.qkv": (8, Correction.MIN), "layers.1.qkv": (8, Correction.MIN)},
    ),
    "Q4_K_M where rows are no multiple of 256": (
        "Q5_0",
        {"token_embd.*": "Q8_0", "*.attn_v.*": "Q8_0", "blk.1.attn_k.*": "Q5_1"},
        {"layers.0.qkv": (8, Correction.ZERO_POINT), "layers.1.qkv": (8, Correction.MIN)},
    ),
    "Q8_0 embedding over Q4_0": (
        "Q4_0",
        {"token_embd.*": "Q8_0"},
        {"embed": (8, Correction.ZERO_POINT), "layers.0.qkv": (4, Correction.ZERO_POINT)},
    ),
    "Q4_0 with some Q4_1 and a Q6_K embedding": (
        "Q4_0",
        {"token_embd.*": "Q6_K", "*.ffn_down.*": "Q4_1", "blk.0.attn_v.*": "Q4_1"},
        {
            "embed": (8, Correction.ZERO_POINT),
            "layers.0.qkv": (4, Correction.MIN),
            "layers.1.qkv": (4, Correction.ZERO_POINT),
        },
    ),
    "F16 embedding over Q4_K": (
        "Q4_K", {"token_embd.*": "F16"}, {"embed": (16, Correction.NONE), "layers.0.qkv": (4, Correction.MIN)}
    ),
    "float types side by side": (
        "F16", {"*.attn_k.*": "BF16", "*.ffn_up.*": "F32"},
        {"layers.0.qkv": (16, Correction.NONE), "layers.1.gate_up": (16, Correction.NONE)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_types_are_mixed_as_real_files_mix_them(tmp_path: Path, mix: str) -> None:
    quant, changes, wanted = MIXES[mix]
    _, formats = assert_carried(
        TinyLlama(**WIDE_SHAPES["hidden 256"], quant=quant, mix=changes).write(tmp_path / "m.gguf")
    )
    for name, expected in wanted.items():
        fmt = formats[name]
        assert fmt is not None
        assert (fmt.bits, fmt.correction) == expected, name


@pytest.mark.parametrize(
    ("q", "v", "bits", "correction"),
    [
        ("Q4_0", "Q8_0", 8, Correction.ZERO_POINT),
        ("Q4_1", "Q8_0", 8, Correction.MIN),
        ("Q4_1", "Q4_0", 4, Correction.MIN),
        ("Q8_0", "Q4_1", 8, Correction.MIN),
        ("Q8_0", "Q4_0", 8, Correction.ZERO_POINT),
        ("Q5_0", "Q4_0", 8, Correction.ZERO_POINT),
        ("Q5_1", "Q5_0", 8, Correction.MIN),
        ("Q4_1", "Q5_0", 8, Correction.MIN),
    ],
)
def test_merged_parts_of_different_types_keep_every_weight(
    tmp_path: Path, q: str, v: str, bits: int, correction: Correction
) -> None:
    _, formats = assert_carried(TinyLlama(quant=q, mix={"*.attn_v.*": v}).write(tmp_path / "m.gguf"))
    assert formats["layers.1.qkv"] == MatrixFormat(128, 64, bits, correction)


@pytest.mark.parametrize(
    ("q", "v", "quantization", "bits", "correction"),
    [
        ("F32", "Q4_1", None, 8, Correction.MIN),
        ("F16", "Q8_0", None, 8, Correction.MIN),
        ("F16", "Q4_0", None, 8, Correction.MIN),
        ("BF16", "Q4_0", "int8", 8, Correction.MIN),
        ("BF16", "Q4_0", "int4", 4, Correction.MIN),
        ("BF16", "Q4_1", "int4", 4, Correction.MIN),
        ("F32", "Q8_0", "int4", 8, Correction.MIN),
    ],
)
def test_float_parts_merged_with_quantized_ones(
    tmp_path: Path, q: str, v: str, quantization: str | None, bits: int, correction: Correction
) -> None:
    """The quantized part keeps its weights, the float part gets the quants of the format that holds both."""
    path = TinyLlama(quant=v, mix={"*.attn_q.*": q, "*.attn_k.*": q}).write(tmp_path / "m.gguf")
    _, formats = assert_carried(path, quantization, lambda name: bits)
    assert formats["layers.1.qkv"] == MatrixFormat(128, 64, bits, correction)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tie", [True, False])
def test_float_weights_are_quantized_on_request(tmp_path: Path, kind: str, tie: bool) -> None:
    path = TinyLlama(quant=kind, hidden=96, heads=3, kv_heads=1, head_dim=32, tie=tie).write(tmp_path / "m.gguf")
    _, formats = assert_carried(path, "none")
    assert kinds_of(formats) == {(16, Correction.NONE)}
    _, formats = assert_carried(path, "int8", lambda name: 8)
    assert kinds_of(formats) == {(8, Correction.MIN)}
    vocabulary = {"token_embd.weight", "output.weight"}
    _, formats = assert_carried(path, "int4", lambda name: 8 if name in vocabulary else 4)
    for name, fmt in formats.items():
        if fmt is not None:
            bits = 8 if name in ("embed", "head") else 4
            assert (fmt.bits, fmt.correction) == (bits, Correction.MIN), name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_only_what_is_float_is_quantized(tmp_path: Path, quantization: str) -> None:
    path = TinyLlama(quant="Q4_0", mix={"token_embd.*": "F16"}).write(tmp_path / "m.gguf")
    _, formats = assert_carried(path, quantization, lambda name: 8)
    assert formats["embed"] == MatrixFormat(307, 64, 8, Correction.MIN)
    assert formats["layers.0.o"] == MatrixFormat(64, 64, 4, Correction.ZERO_POINT)


@pytest.mark.parametrize(
    ("quant", "mix", "quantization", "message"),
    [
        ("Q4_1", {}, "none", r"quantization none needs float weights, .*m.gguf stores Q4_1: leave it out"),
        (
            "Q4_0",
            {"token_embd.*": "F16"},
            "none",
            r"quantization none needs float weights, .*m.gguf stores Q4_0: leave",
        ),
        ("Q8_0", {}, "int8", r"quantization int8 needs float weights, .*m.gguf already stores Q8_0: leave it out"),
        ("Q4_0", {"*.attn_v.*": "Q8_0"}, "int4", r"quantization int4 .* already stores Q4_0, Q8_0: leave it out"),
        ("F16", {}, "fp8", r"quantization must be one of none, int8, int4, got 'fp8'"),
        ("F16", {}, "", r"quantization must be one of none, int8, int4, got ''"),
    ],
)
def test_a_quantization_that_does_not_go_with_the_checkpoint(
    tmp_path: Path, quant: str, mix: dict[str, str], quantization: str, message: str
) -> None:
    path = TinyLlama(quant=quant, mix=mix).write(tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=message):
        converted(path, quantization)


@pytest.mark.parametrize(
    ("quant", "quantization"),
    [("Q4_1", None), ("Q4_K", None), ("Q6_K", None), ("F16", "none"), ("BF16", "int8"), ("F32", "int4")],
)
def test_small_chunks_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, quantization: str | None
) -> None:
    wide: dict[str, Any] = {"hidden": 256, "heads": 16} if quant.endswith("_K") else {"heads": 6, "kv_heads": 3}
    path = TinyLlama(**wide, head_dim=48, ffn=512, quant=quant).write(tmp_path / "m.gguf")

    def packed() -> dict[str, bytes]:
        with open_checkpoint(path) as file:
            _, tensors = convert(file, quantization=quantization)
            return {tensor.name: b"".join(chunk.tobytes() for chunk in tensor.chunks()) for tensor in tensors}

    whole = packed()
    monkeypatch.setattr(convert_module, "CHUNK_VALUES", 1)  # one strip of 64 rows at a time, across heads and parts
    assert packed() == whole


@pytest.mark.parametrize(
    ("quant", "quantization"),
    [("F32", "none"), ("F32", "int8"), ("F32", "int4"), ("F16", "none"), ("Q4_1", None), ("Q6_K", None)],
)
def test_memory_is_that_of_a_chunk_and_not_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, quantization: str | None
) -> None:
    """The largest tensor has 128 times the weights of a chunk, and the peak is half a byte for each of them."""
    num_chunks, chunk_values = 128, 64 * 256
    monkeypatch.setattr(convert_module, "CHUNK_VALUES", chunk_values)
    model = TinyLlama(hidden=256, heads=8, head_dim=32, ffn=256, layers=1, vocab=64 * num_chunks, quant=quant)
    path = model.write(tmp_path / "m.gguf")
    del model
    with open_checkpoint(path) as file:
        _, tensors = convert(file, quantization=quantization)
        assert tensors[0].name == "embed"
        tracemalloc.start()
        try:
            for tensor in tensors:
                deque(tensor.chunks(), maxlen=0)  # each chunk is let go of before the next
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < num_chunks * chunk_values / 2, f"{peak / chunk_values:.1f} bytes per weight of a chunk"


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_precision_norms(tmp_path: Path, kind: str) -> None:
    model = TinyLlama()
    model.types |= {name: kind for name in model.types if name.endswith("norm.weight")}
    assert_carried(model.write(tmp_path / "m.gguf"))


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
            r"tensor blk.1.ffn_down.weight: type MXFP4 is not supported for matrices \(only F32, .*, Q6_K are\)",
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
        (metadata("general.architecture", "mamba"), UnsupportedModelError, "must be one of gemma2, .* has 'mamba'"),
        (metadata("split.count", 4), UnsupportedModelError, r"split over several files .* \(split.count 4\)"),
        (
            poison("blk.0.ffn_gate.weight"),
            FormatError,
            "tensor blk.0.ffn_gate.weight holds a scale that is not finite in float16",
        ),
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_float_weights_that_cannot_be_packed(tmp_path: Path, value: float, quantization: str) -> None:
    model = TinyLlama(quant="F32")
    model.tensors["blk.1.ffn_down.weight"][7, 90] = value
    path = model.write(tmp_path / "m.gguf")
    limit = "3.3895e+38" if quantization == "none" else "65504"
    message = f"tensor blk.1.ffn_down.weight: expected finite values of at most {limit}, found {value:.5g}"
    with pytest.raises(FormatError, match=re.escape(message)):
        converted(path, quantization)


@pytest.mark.parametrize(("kind", "factor"), [("Q4_K", 6e6), ("Q6_K", 2e8)])
def test_k_quants_whose_scales_overflow_float16(tmp_path: Path, kind: str, factor: float) -> None:
    model = TinyLlama(quant=kind, hidden=256, heads=8, head_dim=32, ffn=256)
    model.tensors["blk.0.attn_v.weight"] *= np.float32(factor)
    with pytest.raises(FormatError, match=r"tensor blk.0.attn_v.weight holds a scale that is not finite in float16"):
        converted(model.write(tmp_path / "m.gguf"))


def test_the_largest_weights_that_can_be_packed(tmp_path: Path) -> None:
    model = TinyLlama(quant="F32")
    model.tensors["blk.1.ffn_down.weight"][7, 90] = 65504.0
    path = model.write(tmp_path / "m.gguf")
    for quantization in ("int8", "int4"):
        _, _, weights = converted(path, quantization)
        assert weights["layers.1.down"][7, 90] == pytest.approx(65504, rel=2**-10)
    model.tensors["blk.1.ffn_down.weight"][7, 90] = convert_module.MAX_BF16
    _, _, weights = converted(model.write(path), "none")
    assert weights["layers.1.down"][7, 90] == np.float32(convert_module.MAX_BF16)
