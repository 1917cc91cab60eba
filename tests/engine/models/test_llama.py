from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UnsupportedModelError
from engine.models import llama
from engine.models.registry import FAMILIES, family_of
from engine.models.spec import DecoderSpec
from tests.tiny_gguf import TinyLlama


def read(model: TinyLlama) -> DecoderSpec:
    return llama.read_spec(model.metadata, {name: values.shape for name, values in model.tensors.items()})


def test_spec() -> None:
    spec = read(TinyLlama(hidden=96, layers=3, heads=3, kv_heads=1, head_dim=32, ffn=160, context=777))
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.intermediate_size) == ("llama", 3, 96, 160)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 1, 32)
    assert (spec.vocab_size, spec.max_position, spec.norm_eps) == (307, 777, 1e-5)
    assert (spec.rope.theta, spec.rope.dim, spec.tie_embeddings) == (10000.0, 32, True)


def test_a_separate_head_unties_the_embedding() -> None:
    assert not read(TinyLlama(tie=False)).tie_embeddings


def test_optional_keys_have_the_format_s_defaults() -> None:
    model = TinyLlama()
    for key in ("key_length", "value_length", "head_count_kv"):
        del model.metadata[f"llama.attention.{key}"]
    for key in ("rope.dimension_count", "rope.freq_base", "vocab_size"):
        del model.metadata[f"llama.{key}"]
    spec = read(model)
    assert (spec.head_dim, spec.num_kv_heads, spec.vocab_size) == (16, 4, 307)
    assert (spec.rope.dim, spec.rope.theta) == (16, 10000.0)


@pytest.mark.parametrize("tie", [True, False])
def test_recipes_make_exactly_the_spec_s_tensors(tie: bool) -> None:
    model = TinyLlama(tie=tie)
    spec = read(model)
    recipes = llama.recipes(spec)
    assert {recipe.name: recipe.shape for recipe in recipes} == spec.tensor_shapes()
    used = {part.tensor: part.shape for recipe in recipes for part in recipe.parts}
    assert used == {name: values.shape for name, values in model.tensors.items()}


def test_equal_values_per_layer_count_as_one() -> None:
    model = TinyLlama()
    model.metadata["llama.attention.head_count_kv"] = np.array([2, 2], np.int32)
    assert read(model).num_kv_heads == 2
    model.metadata["llama.attention.head_count_kv"] = np.array([2, 4], np.int32)
    with pytest.raises(
        UnsupportedModelError, match=r"head_count_kv must be one non-negative integer, got array\(\[2, 4"
    ):
        read(model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", "yarn", "llama.rope.scaling.type must be 'none', the checkpoint has 'yarn'"),
        ("rope.scaling.factor", 8.0, r"llama.rope.scaling.factor must be 0.0 or 1.0, the checkpoint has 8.0"),
        ("rope.scale_linear", 4.0, "llama.rope.scale_linear"),
        ("expert_count", 8, "llama.expert_count must be 0, the checkpoint has 8"),
        ("attention.sliding_window", 4096, "llama.attention.sliding_window"),
        ("attention.causal", False, "llama.attention.causal"),
        ("logit_scale", np.array([1.0, 2.0]), "llama.logit_scale"),
        ("attention.head_count", None, "metadata lack llama.attention.head_count"),
        ("attention.head_count", 0, "num_heads must be at least 1"),
        ("attention.head_count_kv", 3, "num_heads must be a multiple of num_kv_heads 3"),
        ("attention.value_length", 32, "value_length must be key_length 16, got 32"),
        ("embedding_length", -1, "embedding_length must be one non-negative integer, got -1"),
        ("embedding_length", "64", "embedding_length must be one non-negative integer, got '64'"),
        ("embedding_length", 72, "hidden_size must be a multiple of 32, the checkpoint has 72"),
        ("rope.freq_base", float("nan"), "rope.freq_base must be a positive number, got nan"),
        ("rope.freq_base", True, "rope.freq_base must be a positive number, got True"),
        ("rope.dimension_count", 8, "rope.dim must be head_dim 16, the checkpoint has 8"),
        ("attention.layer_norm_rms_epsilon", 0.0, "layer_norm_rms_epsilon must be a positive number, got 0.0"),
        ("vocab_size", 308, "vocab_size is 308, but token_embd.weight has 307 rows"),
        ("block_count", 4_000_000_000, "block_count is 4000000000, which takes 36000000000 tensors and more"),
    ],
)
def test_what_we_cannot_compute_is_refused_by_name(key: str, value: object, message: str) -> None:
    model = TinyLlama()
    if value is None:
        del model.metadata["llama." + key]
    else:
        model.metadata["llama." + key] = value
    with pytest.raises(UnsupportedModelError, match=message):
        read(model)


def test_neutral_values_pass() -> None:
    model = TinyLlama()
    plain = read(model)
    model.metadata |= {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 1.0, "llama.expert_count": 0}
    assert read(model) == plain


def test_rope_frequency_factors_are_refused() -> None:
    model = TinyLlama()
    model.tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    with pytest.raises(UnsupportedModelError, match=r"rope scaling by frequency factors \(tensor rope_freqs.weight\)"):
        read(model)


def test_a_missing_embedding_is_named() -> None:
    model = TinyLlama()
    del model.tensors["token_embd.weight"]
    model.tensors["something.else"] = np.ones(8, np.float32)
    with pytest.raises(UnsupportedModelError, match=r"token_embd.weight must be a matrix .* found no such tensor"):
        read(model)


def test_registry() -> None:
    assert family_of({"general.architecture": "llama"}) is FAMILIES["llama"]
    with pytest.raises(UnsupportedModelError, match="must be one of llama, the checkpoint has 'mamba'"):
        family_of({"general.architecture": "mamba"})
    with pytest.raises(UnsupportedModelError, match="the checkpoint has None"):
        family_of({})
