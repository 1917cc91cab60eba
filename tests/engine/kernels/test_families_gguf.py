"""Every family through GGUF: float32 files give the folder's tensors, quantized ones logits near those of float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.kernels.batch import Float32
from engine.kernels.reference import ReferenceProgram
from engine.weights import PackedModel, load_model
from tests.engine.kernels.conftest import ProgramFactory
from tests.engine.kernels.steps import cosines, sequence_logits
from tests.tiny_families import FAMILIES, tiny_folder, tiny_gguf

NUM_TOKENS = 70
NUM_BLOCKS = 3
WIDE = {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 256}
"""Rows of K-quants are blocks of 256."""


def head_dim_of(name: str) -> int:
    return 16 if name == "phi3" else 64  # its factors are those of 12 turned lanes


def load(name: str, quant: str, folder: Path) -> PackedModel:
    """A family's GGUF file with matrices of `quant`."""
    sizes = {**WIDE, "head_dim": head_dim_of(name)}
    if name == "phi3":  # whose heads have an equal share of the hidden size
        sizes["heads"], sizes["kv_heads"] = 16, 8
    model = tiny_folder(name, seed=3, **sizes)
    path = tiny_gguf(name, model, quant, head_dim=head_dim_of(name)).write(folder / f"{name}-{quant}.gguf")
    return load_model(str(path), home=folder / "home")


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_float_file_gives_the_folder_s_tensors(name: str, tmp_path: Path) -> None:
    """So what holds of the folder beside transformers holds of the file."""
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96}
    if name == "gemma2":
        sizes["head_dim"] = 48  # what its config.json scales queries by
    if name == "gemma3":
        sizes["head_dim"] = 32
    folder = tiny_folder(name, dtype="F32", **sizes)
    file = tiny_gguf(name, folder, "F32", head_dim=sizes["head_dim"])
    ours = load_model(str(folder.write(tmp_path / "folder")), home=tmp_path / "home")
    theirs = load_model(str(file.write(tmp_path / "model.gguf")), home=tmp_path / "home")
    rope = replace(theirs.info.spec.rope, attention_factor=ours.info.spec.rope.attention_factor)
    assert rope.frequencies(512) == pytest.approx(ours.info.spec.rope.frequencies(512))
    rope = replace(rope, factors=ours.info.spec.rope.factors, long_factors=ours.info.spec.rope.long_factors)
    assert replace(theirs.info.spec, rope=rope) == replace(ours.info.spec, norm_eps=theirs.info.spec.norm_eps)
    assert theirs.weights.keys() == ours.weights.keys()
    for tensor, packed in ours.weights.items():
        np.testing.assert_array_equal(theirs.weights[tensor].data, packed.data, err_msg=tensor)


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_quantized_files(name: str, quant: str, tmp_path: Path, program_factory: ProgramFactory) -> None:
    model = load(name, quant, tmp_path)
    spec = model.info.spec
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, NUM_TOKENS).astype(np.int32)
    exact = sequence_logits(
        ReferenceProgram(spec, model.weights, num_blocks=NUM_BLOCKS, activations="float32", kv_dtype="float32"),
        spec,
        tokens,
    )
    twin = sequence_logits(ReferenceProgram(spec, model.weights, num_blocks=NUM_BLOCKS), spec, tokens)
    program = program_factory(spec, model.weights, num_blocks=NUM_BLOCKS)
    native: Float32 = sequence_logits(program, spec, tokens)
    assert cosines(twin, exact).mean() >= 0.999
    if program.isa == "portable":
        assert cosines(native, twin).mean() >= 0.9999
    else:
        np.testing.assert_array_equal(native, twin)
