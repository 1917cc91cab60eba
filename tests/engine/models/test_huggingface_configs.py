"""What we make of a config.json against what transformers makes of it; tests/golden says where that is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models.blueprint import Blueprint, Description
from engine.models.registry import read_gguf, read_huggingface
from engine.models.spec import DecoderSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "huggingface_configs.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["configs"]


def read(config: dict[str, Any], read_by_transformers: dict[str, Any]) -> Blueprint:
    """The blueprint of a checkpoint that has the tensors which transformers would look for."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_size = config["num_attention_heads"] * read_by_transformers["head_dim"]
    kv_size = read_by_transformers["num_kv_heads"] * read_by_transformers["head_dim"]
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        layer + "input_layernorm.weight": (hidden,),
        layer + "self_attn.q_proj.weight": (q_size, hidden),
        layer + "self_attn.k_proj.weight": (kv_size, hidden),
        layer + "self_attn.v_proj.weight": (kv_size, hidden),
        layer + "self_attn.o_proj.weight": (hidden, q_size),
        layer + "post_attention_layernorm.weight": (hidden,),
        layer + "mlp.gate_proj.weight": (ffn, hidden),
        layer + "mlp.up_proj.weight": (ffn, hidden),
        layer + "mlp.down_proj.weight": (hidden, ffn),
        "model.norm.weight": (hidden,),
    }
    if not read_by_transformers["tied"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    blueprint = read_huggingface(Description(config, shapes, _no_reading, _no_reading))
    assert {part.tensor: part.shape for recipe in blueprint.recipes for part in recipe.parts} == shapes
    return blueprint


def _no_reading(*names: str) -> Any:
    raise AssertionError(f"the configuration alone must settle it, {names} was read")


def test_transformers_used_silu_everywhere() -> None:
    assert {case["read"]["activation"] for case in CASES} == {"SiLUActivation", "SiLU"}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_config_means_what_transformers_makes_of_it(case: dict[str, Any]) -> None:
    expected = case["read"]
    spec: DecoderSpec = read(case["config"], expected).spec
    assert (spec.num_kv_heads, spec.head_dim) == (expected["num_kv_heads"], expected["head_dim"])
    assert (spec.norm_eps, spec.tie_embeddings) == (expected["norm_eps"], expected["tied"])
    assert spec.max_position == expected["max_position"]
    window = expected["sliding_window"] or 0
    # One that hides nothing is none.
    assert {spec.window(i) for i in range(spec.num_layers)} == {window if window < spec.max_position else 0}
    # transformers computes these in float32, in several roundings.
    np.testing.assert_allclose(spec.rope.frequencies(), expected["inv_freq"], rtol=5e-7)


def llama3_cases() -> list[dict[str, Any]]:
    return [
        case
        for case in CASES
        if "llama3" in json.dumps([case["config"].get("rope_scaling"), case["config"].get("rope_parameters")])
    ]


@pytest.mark.parametrize("case", llama3_cases())
def test_gguf_has_the_same_frequencies_by_its_factors(case: dict[str, Any]) -> None:
    """Converters write what each frequency is divided by, in float32, as the tensor rope_freqs.weight."""
    config, expected = case["config"], case["read"]
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    dim = expected["head_dim"]
    plain = theta ** (-2.0 * np.arange(dim // 2) / dim)
    factors = (plain / np.array(expected["inv_freq"])).astype(np.float32)
    assert factors.min() == pytest.approx(1.0)
    assert factors.max() > 4
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.key_length": dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": theta,
    }
    shapes: dict[str, tuple[int, ...]] = {f"unread.{i}": (1,) for i in range(9)}
    shapes |= {"token_embd.weight": (64, config["hidden_size"]), "rope_freqs.weight": (dim // 2,)}
    vectors = {"rope_freqs.weight": factors}
    spec = read_gguf(Description(metadata, shapes, vectors.__getitem__, _no_reading)).spec
    np.testing.assert_allclose(spec.rope.frequencies(), expected["inv_freq"], rtol=5e-7)
    from_config = read(config, expected).spec.rope
    np.testing.assert_allclose(spec.rope.factors, from_config.factors, rtol=5e-7)
