from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import ModelError, UnsupportedModelError
from engine.models.blueprint import Blueprint, Description
from engine.models.registry import read_gguf, read_huggingface
from engine.models.spec import DecoderSpec
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder


def describe(model: TinyLlama | TinyFolder) -> Description:
    tensors = model.tensors
    return Description(
        model.metadata if isinstance(model, TinyLlama) else model.config,
        {name: values.shape for name, values in tensors.items()},
        lambda name: tensors[name],
        lambda first, second: np.array_equal(tensors[first], tensors[second]),
    )


def blueprint(model: TinyLlama | TinyFolder) -> Blueprint:
    return (read_gguf if isinstance(model, TinyLlama) else read_huggingface)(describe(model))


def spec_of(model: TinyLlama | TinyFolder) -> DecoderSpec:
    return blueprint(model).spec


BOTH = pytest.mark.parametrize("make", [TinyLlama, TinyFolder])


@BOTH
def test_spec(make: Callable[..., TinyLlama | TinyFolder]) -> None:
    spec = spec_of(make(hidden=96, layers=3, heads=6, kv_heads=2, head_dim=48, ffn=160, context=777))
    assert (spec.family, spec.num_layers, spec.hidden_size, spec.intermediate_size) == ("llama", 3, 96, 160)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (6, 2, 48)
    assert (spec.vocab_size, spec.max_position, spec.norm_eps) == (307, 777, 1e-5)
    assert (spec.rope.theta, spec.rope.dim, spec.rope.factors, spec.tie_embeddings) == (10000.0, 48, (), True)


@BOTH
def test_a_separate_head_unties_the_embedding(make: Callable[..., TinyLlama | TinyFolder]) -> None:
    assert not spec_of(make(tie=False)).tie_embeddings


@BOTH
@pytest.mark.parametrize("tie", [True, False])
def test_recipes_make_exactly_the_spec_s_tensors(make: Callable[..., TinyLlama | TinyFolder], tie: bool) -> None:
    model = make(tie=tie)
    made = blueprint(model)
    assert {recipe.name: recipe.shape for recipe in made.recipes} == made.spec.tensor_shapes()
    used = {part.tensor: part.shape for recipe in made.recipes for part in recipe.parts}
    assert used == {name: values.shape for name, values in model.tensors.items()}
    interleaved = {part.interleaved_heads for recipe in made.recipes for part in recipe.parts}
    assert interleaved == ({0, 2, 4} if make is TinyLlama else {0})


@BOTH
def test_a_missing_embedding_is_named(make: Callable[..., TinyLlama | TinyFolder]) -> None:
    model = make()
    name = "token_embd.weight" if isinstance(model, TinyLlama) else "model.embed_tokens.weight"
    model.tensors["something.else"] = model.tensors.pop(name)
    with pytest.raises(UnsupportedModelError, match=rf"{name} must be a matrix .*, 64\], found no such tensor"):
        spec_of(model)
    model.tensors[name] = np.ones(64, np.float32)
    with pytest.raises(UnsupportedModelError, match=rf"{name} must be a matrix .*, found shape \[64\]"):
        spec_of(model)


# GGUF


def test_optional_keys_have_the_format_s_defaults() -> None:
    model = TinyLlama()
    for key in ("key_length", "value_length", "head_count_kv"):
        del model.metadata[f"llama.attention.{key}"]
    for key in ("rope.dimension_count", "rope.freq_base", "vocab_size"):
        del model.metadata[f"llama.{key}"]
    spec = spec_of(model)
    assert (spec.head_dim, spec.num_kv_heads, spec.vocab_size) == (16, 4, 307)
    assert (spec.rope.dim, spec.rope.theta) == (16, 10000.0)


def test_equal_values_per_layer_count_as_one() -> None:
    model = TinyLlama()
    model.metadata["llama.attention.head_count_kv"] = np.array([2, 2], np.int32)
    assert spec_of(model).num_kv_heads == 2
    model.metadata["llama.attention.head_count_kv"] = np.array([2, 4], np.int32)
    with pytest.raises(UnsupportedModelError, match=r"head_count_kv must be one integer .*, got array\(\[2, 4"):
        spec_of(model)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", "longrope", "rope scaling must be none, linear or yarn, the checkpoint has 'longrope'"),
        ("rope.scaling.factor", -1.0, "llama.rope.scaling.factor must be a positive number, got -1.0"),
        ("rope.scaling.factor", np.array([1.0, 2.0]), "llama.rope.scaling.factor must be a positive number, got array"),
        ("rope.scaling.attn_factor", 1.2, "llama.rope.scaling.attn_factor must be 1.0, the checkpoint has 1.2"),
        ("expert_count", 8, "the checkpoint's configuration lacks llama.expert_used_count"),
        ("attention.sliding_window", -1, "llama.attention.sliding_window must be one integer from 0"),
        ("attention.causal", False, "llama.attention.causal must be True, the checkpoint has False"),
        ("logit_scale", np.array([1.0, 2.0]), "llama.logit_scale"),
        ("attention.head_count", None, "the checkpoint's configuration lacks llama.attention.head_count"),
        ("attention.head_count", 0, "head_count must be one integer from 1"),
        ("attention.head_count_kv", 3, "num_heads must be a multiple of num_kv_heads 3"),
        ("attention.value_length", 32, "value_length must be 16, the checkpoint has 32"),
        ("attention.key_length", 1 << 30, "key_length must be one integer from 1 to 1024, got 1073741824"),
        ("embedding_length", -1, "embedding_length must be one integer from 1 to 2147483647, got -1"),
        ("embedding_length", "64", "embedding_length must be one integer from 1 to 2147483647, got '64'"),
        ("embedding_length", 72, "hidden_size must be a multiple of 32, the checkpoint has 72"),
        ("rope.freq_base", float("nan"), "rope.freq_base must be a positive number, got nan"),
        ("rope.freq_base", True, "rope.freq_base must be a positive number, got True"),
        ("rope.dimension_count", 8, "rope.dimension_count must be 16, the checkpoint has 8"),
        ("attention.layer_norm_rms_epsilon", 0.0, "layer_norm_rms_epsilon must be a positive number, got 0.0"),
        ("vocab_size", 308, "vocab_size is 308, but token_embd.weight has 307 rows"),
        ("context_length", 0, "max_position must be at least 1, the checkpoint has 0"),
        ("block_count", 2_000_000_000, "block_count is 2000000000, which takes 12000000000 tensors and more"),
    ],
)
def test_gguf_that_we_cannot_compute_is_refused_by_name(key: str, value: object, message: str) -> None:
    model = TinyLlama()
    model.metadata["llama." + key] = value  # None counts as missing
    with pytest.raises(UnsupportedModelError, match=message):
        spec_of(model)


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 8.0},
        {"rope.scaling.type": "linear"},
        {"rope.scaling.factor": 0.0},
        {"rope.scale_linear": 0.0},
        {"rope.scale_linear": 1.0},
        {"expert_count": 0},
        {"attention.sliding_window": 0},
        {"attention.sliding_window": 512},
    ],
)
def test_neutral_metadata_pass(metadata: dict[str, object]) -> None:
    model = TinyLlama()
    plain = spec_of(model)
    model.metadata |= {"llama." + key: value for key, value in metadata.items()}
    assert spec_of(model) == plain


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 4.0},
        {"rope.scale_linear": 4.0},
        {"rope.scaling.type": "linear", "rope.scale_linear": 4.0},
        {"rope.scaling.factor": 4.0, "rope.scale_linear": 8.0},
    ],
)
def test_linear_scaling_of_gguf(metadata: dict[str, object]) -> None:
    model = TinyLlama()
    model.metadata |= {"llama." + key: value for key, value in metadata.items()}
    assert spec_of(model).rope.factors == (4.0,) * 8


def test_rope_frequency_factors_of_gguf() -> None:
    model = TinyLlama()
    model.tensors["rope_freqs.weight"] = np.array([1, 1, 1, 1.5, 2, 8, 8, 8], np.float32)
    made = blueprint(model)
    assert made.spec.rope.factors == (1.0, 1.0, 1.0, 1.5, 2.0, 8.0, 8.0, 8.0)
    assert made.ignored == {"rope_freqs.weight"}
    model.metadata["llama.rope.scaling.factor"] = 2.0
    with pytest.raises(UnsupportedModelError, match=r"must be given once, .*factor 2 and rope_freqs.weight"):
        spec_of(model)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1, 1], r"rope_freqs.weight must be a vector \[8\], found shape \[2\]"),
        ([0] * 8, "rope.factors must be positive"),
    ],
)
def test_rope_frequency_factors_that_cannot_be(factors: list[float], message: str) -> None:
    model = TinyLlama()
    model.tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    with pytest.raises(UnsupportedModelError, match=message):
        spec_of(model)


# Hugging Face; what transformers makes of a config.json, test_huggingface_configs compares


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures must be a list with a \.\.\.ForCausalLM",
        ),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list"),
        ({"architectures": []}, "architectures must be a list"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config must be absent, .* quant_method 'gptq': .* are read from GGUF files",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config must be absent"),
        ({"quantization_config": "int8"}, "quantization_config must be an object, got 'int8'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config must be absent"),
        ({"attention_bias": True}, "attention_bias must be False, the checkpoint has True"),
        ({"mlp_bias": True}, "mlp_bias must be False, the checkpoint has True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', the checkpoint has 'gelu'"),
        ({"num_local_experts": 8}, "num_local_experts must be 0, the checkpoint has 8"),
        ({"layer_types": ["sliding_attention"] * 2}, r"layer_types must be absent, the checkpoint has \['sliding"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, the checkpoint has 0.5"),
        ({"vocab_size": 308}, "vocab_size is 308, but model.embed_tokens.weight has 307 rows"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, which takes 24 tensors and more, but .* has 20"),
        ({"num_hidden_layers": 1.0}, "num_hidden_layers must be one integer from 1 to 2147483647, got 1.0"),
        ({"num_hidden_layers": 10**5000}, "num_hidden_layers must be .*, got a number that is too long to show"),
        ({"hidden_size": True}, "hidden_size must be one integer from 1 to 2147483647, got True"),
        ({"num_attention_heads": 0}, "num_attention_heads must be one integer from 1"),
        ({"num_attention_heads": 5, "head_dim": None}, "the hidden size must be a multiple of the 5 heads .*, got 64"),
        ({"head_dim": 10**9}, "head_dim must be one integer from 1 to 1024, got 1000000000"),
        ({"head_dim": 24}, "head_dim must be a multiple of 16"),
        ({"max_position_embeddings": None}, "the checkpoint's configuration lacks max_position_embeddings"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"rope_theta": -1.0, "rope_parameters": None}, "rope_theta must be a positive number, got -1.0"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type must be a string, got 3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
        *(
            (
                {"rope_parameters": {"rope_type": kind, "factor": 4.0}},
                f"rope scaling must be default, linear, llama3, yarn or longrope, the checkpoint has '{kind}'",
            )
            for kind in ("dynamic", "su", "mrope", "none")
        ),
        ({"rope_scaling": {"type": "linear"}}, "the checkpoint's configuration lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive number, got 0"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor must be below high_freq_factor 4, got 4",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1}},
            "the checkpoint's configuration lacks high_freq_factor",
        ),
        ({"model_type": "mamba"}, "model_type must be one of bert, .*, the checkpoint has 'mamba'"),
        ({"model_type": ["llama"]}, r"model_type must be one of bert, .*, the checkpoint has \['llama'\]"),
        ({"model_type": None}, "model_type must be one of bert, .*, the checkpoint has None"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be one integer from 1"),
    ],
)
def test_config_that_we_cannot_compute_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec_of(TinyFolder(config=change))


def test_a_sliding_window_is_of_every_layer() -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert spec_of(TinyFolder(config={**mistral, "sliding_window": 100})).windows == (100, 100)
    assert spec_of(TinyFolder(config={**mistral, "sliding_window": 512})).windows == ()  # it hides nothing
    assert spec_of(TinyFolder(config={**mistral, "sliding_window": None})).windows == ()
    assert spec_of(TinyFolder(config={"sliding_window": 100})).windows == ()  # Llama has none
    model = TinyLlama()
    model.metadata["llama.attention.sliding_window"] = 100
    assert (spec_of(model).windows, spec_of(model).max_position) == ((100, 100), 512)


def test_a_head_that_is_a_copy_of_the_embedding_is_left_out() -> None:
    model = TinyFolder()
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].copy()
    made = blueprint(model)
    assert made.spec.tie_embeddings
    assert made.ignored == {"lm_head.weight"}


def test_a_head_of_its_own_counts_whatever_the_configuration_says(caplog: pytest.LogCaptureFixture) -> None:
    model = TinyFolder(tie=False)
    untied = blueprint(model)
    model.config["tie_word_embeddings"] = True
    with caplog.at_level(logging.WARNING):
        assert blueprint(model) == untied
    assert "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight" in caplog.text


def test_stored_frequencies_have_no_influence() -> None:
    model = TinyFolder()
    plain = blueprint(model)
    names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)}
    model.tensors |= {name: np.ones(8, np.float32) for name in names}
    assert blueprint(model) == replace(plain, ignored=frozenset(names))


def test_a_gguf_family_that_we_do_not_load() -> None:
    model = TinyLlama()
    model.metadata["general.architecture"] = "mamba"
    with pytest.raises(ModelError, match=r"general.architecture must be one of gemma2, .*, the checkpoint has 'mamba'"):
        spec_of(model)
    del model.metadata["general.architecture"]
    with pytest.raises(ModelError, match="the checkpoint has None"):
        spec_of(model)
