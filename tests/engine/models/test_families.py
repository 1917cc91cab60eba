"""What each family's file makes of a configuration, in either format."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UnsupportedModelError
from engine.models.blueprint import Blueprint
from engine.models.registry import GGUF_FAMILIES, HUGGINGFACE_FAMILIES
from engine.models.spec import DecoderSpec
from tests.engine.models.test_llama import blueprint
from tests.tiny_encoders import ENCODERS
from tests.tiny_families import FAMILIES, tiny_folder, tiny_gguf
from tests.tiny_hf import TinyFolder

SIZES: dict[str, int] = {"hidden": 96, "layers": 7, "heads": 4, "kv_heads": 2, "head_dim": 48, "ffn": 160}
PHI_SIZES: dict[str, int] = {**SIZES, "hidden": 64, "head_dim": 16}


def sizes_of(name: str) -> dict[str, int]:
    return PHI_SIZES if name == "phi3" else SIZES


def folder(name: str, **config: object) -> TinyFolder:
    model = tiny_folder(name, **sizes_of(name))
    if "query_pre_attn_scalar" in model.config:
        model.config["query_pre_attn_scalar"] = sizes_of(name)["head_dim"]  # as GGUF takes for granted
    model.config |= config
    return model


def spec_of(name: str, **config: object) -> DecoderSpec:
    return blueprint(folder(name, **config)).spec


def from_gguf(name: str, **metadata: object) -> Blueprint:
    model = tiny_gguf(name, folder(name), "F32", head_dim=sizes_of(name)["head_dim"])
    architecture = FAMILIES[name].gguf
    model.metadata |= {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return blueprint(model)


def test_every_registered_family_is_tested() -> None:
    tested = {family.model_type for family in FAMILIES.values()}
    encoders = {encoder.model_type for encoder in ENCODERS.values()}
    assert HUGGINGFACE_FAMILIES.keys() == tested | encoders | {"llama"}
    assert GGUF_FAMILIES.keys() == {family.gguf for family in FAMILIES.values()}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_formats_describe_the_same_decoder(name: str) -> None:
    ours, theirs = blueprint(folder(name)), from_gguf(name)
    attention = [spec.rope.attention_factor for spec in (ours.spec, theirs.spec)]
    assert attention[0] == pytest.approx(attention[1])
    short = [spec.rope.factors for spec in (ours.spec, theirs.spec)]
    assert short[0] == pytest.approx(short[1])
    long = [spec.rope.long_factors for spec in (ours.spec, theirs.spec)]
    assert long[0] == pytest.approx(long[1])
    rope = replace(theirs.spec.rope, attention_factor=attention[0], factors=short[0], long_factors=long[0])
    assert replace(theirs.spec, rope=rope, family="") == replace(ours.spec, family="")


@pytest.mark.parametrize("name", FAMILIES)
def test_recipes_use_every_tensor(name: str) -> None:
    model = folder(name)
    for made, tensors in (
        (blueprint(model), model.tensors),
        (from_gguf(name), tiny_gguf(name, model, "F32", head_dim=sizes_of(name)["head_dim"]).tensors),
    ):
        used = {part.tensor: part.stored_shape for recipe in made.recipes for part in recipe.parts}
        assert used.keys() | made.ignored == tensors.keys()
        assert used == {key: values.shape for key, values in tensors.items() if key in used}


def test_qwen_slides_from_a_layer_on_where_it_is_told_to() -> None:
    assert spec_of("qwen2").windows == ()
    assert spec_of("qwen2", sliding_window=100).windows == ()  # use_sliding_window is false
    sliding = {"use_sliding_window": True, "sliding_window": 100}
    assert spec_of("qwen3", **sliding, max_window_layers=5).windows == (0, 0, 0, 0, 0, 100, 100)
    assert spec_of("qwen3", **sliding, max_window_layers=28).windows == ()
    kinds = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    assert spec_of("qwen3", **sliding, layer_types=kinds).windows == (0, 100, 0, 100, 0, 100, 0)


def test_gemma_slides_in_turns() -> None:
    assert spec_of("gemma2").windows == (20, 0, 20, 0, 20, 0, 20)
    assert spec_of("gemma3").windows == (20, 20, 20, 20, 20, 0, 20)
    assert spec_of("gemma3", sliding_window_pattern=3).windows == (20, 20, 0, 20, 20, 0, 20)
    # A window that hides nothing still decides how a layer turns.
    assert spec_of("gemma3", sliding_window=512).windows == (512,) * 5 + (0, 512)


def test_gemma_3_turns_by_two_bases_in_every_spelling() -> None:
    new = spec_of("gemma3")
    old = folder("gemma3", rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 8.0})
    del old.config["rope_parameters"]
    mixed = folder("gemma3", rope_scaling={"factor": 8.0})
    mixed.config["rope_parameters"] = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6}}
    for other in (blueprint(old).spec, blueprint(mixed).spec):
        assert (other.rope, other.local_rope) == (new.rope, new.local_rope)
    assert new.rope.factors == (8.0,) * 24
    assert new.local_rope is not None
    assert (new.local_rope.theta, new.local_rope.factors) == (10000.0, ())


def test_gemma_2_is_capped_where_a_file_says_nothing_of_it() -> None:
    model = tiny_gguf("gemma2", folder("gemma2"), "F32", head_dim=48)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        del model.metadata[f"gemma2.{key}"]
    spec = blueprint(model).spec
    assert (spec.attention_softcap, spec.final_softcap) == (50.0, 30.0)
    spec = from_gguf("gemma2", attn_logit_softcapping=0.0, final_logit_softcapping=0.0).spec
    assert (spec.attention_softcap, spec.final_softcap) == (0.0, 0.0)


def test_the_largest_gemmas_scale_queries_otherwise() -> None:
    """GGUF has no key for it: llama.cpp knows them by their layers."""
    model = tiny_gguf("gemma2", tiny_folder("gemma2", **{**SIZES, "layers": 46}), "F32", head_dim=48)
    assert blueprint(model).spec.attention_scale == pytest.approx((96 / 4) ** -0.5)
    assert from_gguf("gemma2").spec.attention_scale == pytest.approx(48**-0.5)


def test_long_factors_are_those_of_contexts_beyond_the_first_training() -> None:
    spec = spec_of("phi3")
    assert spec.max_position == 512
    bare = 10000.0 ** (-2.0 * np.arange(6) / 12)
    np.testing.assert_allclose(spec.rope.frequencies(64), bare / np.array(spec.rope.factors))
    np.testing.assert_allclose(spec.rope.frequencies(65), bare / np.array(spec.rope.long_factors))
    assert spec_of("phi3", original_max_position_embeddings=512).rope.attention_factor == 1.0


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("qwen2", {"rope_scaling": {"type": "yarn"}}, "lacks factor"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, "rope_theta must be above 1"),
        ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling must be default, linear"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be False, the checkpoint has True"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types must be 7 times sliding_attention or full"),
        ("qwen3", {"use_sliding_window": 1}, "use_sliding_window must be true or false, got 1"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh'"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be a positive number"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters must be an object with full_attention"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be at most 1, got 1.5"),
        ("phi3", {"partial_rotary_factor": 0.01, "rope_scaling": None}, "rope.dim must be an even number from 2"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor must be 6 positive"),
        ("phi3", {"original_max_position_embeddings": 1}, "original_max_position_embeddings must be at least 2"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be one integer from 1"),
        (
            "mixtral",
            {"num_experts_per_tok": 5},
            "experts_per_token must be from 1 to num_experts 4, the checkpoint has 5",
        ),
        (
            "mixtral",
            {"num_local_experts": 10**9},
            "num_layers \\* num_experts must be at most 65536, .* has 7000000000",
        ),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step must be 1, the checkpoint has 2"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers must be empty, got \[0\]"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(
    name: str, config: dict[str, object], message: str
) -> None:
    if "rope_parameters" in config:
        model = folder(name)
        model.config["rope_parameters"] = config["rope_parameters"]
    else:
        model = folder(name, **config)
    with pytest.raises(UnsupportedModelError, match=message):
        blueprint(model)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("qwen2", {"attention__sliding_window": 100}, "qwen2.attention.sliding_window must be 0"),
        ("gemma2", {"attention__sliding_window": 0}, "gemma2.attention.sliding_window must be one integer from 1"),
        ("qwen2", {"expert_count": 4}, "lacks qwen2.expert_used_count"),
        ("qwen2", {"expert_count": 4, "expert_used_count": 2}, "qwen2.expert_count must be absent or 0, got 4"),
        ("qwen3_moe", {"expert_count": 0}, "qwen3moe.expert_count must be at least 1, got 0"),
        ("gemma3", {"attention__scale": 2.0}, "gemma3.attention.scale must be 0.0"),
        ("phi3", {"rope__dimension_count": 18}, "phi3.rope.dimension_count must be one integer from 2 to 16"),
        ("phi3", {"rope__dimension_count": 10}, r"rope_factors_long.weight must be a vector \[5\], found shape \[6\]"),
        ("phi3", {"rope__scaling__type": "linear"}, "rope scaling must be longrope beside its factors"),
    ],
)
def test_the_same_of_gguf(name: str, metadata: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        from_gguf(name, **metadata)


def test_half_of_the_long_factors_is_an_error() -> None:
    model = tiny_gguf("phi3", folder("phi3"), "F32", head_dim=16)
    del model.tensors["rope_factors_short.weight"]
    with pytest.raises(UnsupportedModelError, match=r"must both be there or neither, found rope_factors_long\.weight"):
        blueprint(model)
