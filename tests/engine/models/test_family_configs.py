"""What the other families' files make of a config.json against what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models.blueprint import Description
from engine.models.registry import HUGGINGFACE_FAMILIES, read_huggingface
from engine.models.spec import DecoderSpec, RopeSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "family_configs.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["configs"]


def spec_of(config: dict[str, Any], *, tied: bool) -> DecoderSpec:
    """Of a checkpoint that has the embedding and its head; what else it has a configuration cannot say."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"])}
    if not tied:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    shapes |= {f"other.{i}": (1,) for i in range(20 * config["num_hidden_layers"])}

    def read(*names: str) -> Any:
        raise AssertionError(f"the configuration alone must settle it, {names} was read")

    spec: DecoderSpec = read_huggingface(Description(config, shapes, read, read)).spec
    return spec


def assert_turns(rope: RopeSpec, context: int, inv_freq: list[float]) -> None:
    # transformers computes these in float32, in several roundings.
    np.testing.assert_allclose(rope.frequencies(context), inv_freq, rtol=2e-6)


def test_every_other_family_is_compared() -> None:
    assert {case["config"]["model_type"] for case in CASES} == HUGGINGFACE_FAMILIES.keys() - {
        "llama", "mistral", "qwen3_moe", "bert", "roberta", "xlm-roberta",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_config_means_what_transformers_makes_of_it(case: dict[str, Any]) -> None:
    config, expected = case["config"], case["read"]
    spec = spec_of(config, tied=expected["tied"])
    assert (spec.num_kv_heads, spec.head_dim) == (expected["num_kv_heads"], expected["head_dim"])
    assert (spec.norm_eps, spec.tie_embeddings) == (expected["norm_eps"], expected["tied"])
    assert spec.max_position == expected["max_position"]
    assert [spec.window(i) for i in range(spec.num_layers)] == expected["windows"]
    assert spec.query_scale() == pytest.approx(expected["scale"])
    assert spec.attention_softcap == expected["attention_softcap"]
    assert spec.final_softcap == expected["final_softcap"]
    assert spec.rope.attention_factor == pytest.approx(expected["attention_factor"])
    assert_turns(spec.rope, 0, expected["inv_freq"])
    assert_turns(spec.rope, 10**6, expected["long_inv_freq"])
    assert (spec.local_rope is None) == (expected["local_inv_freq"] is None)
    if spec.local_rope is not None:
        assert_turns(spec.local_rope, 0, expected["local_inv_freq"])
