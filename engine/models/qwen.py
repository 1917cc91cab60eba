"""Qwen 2, 2.5 and 3: Llama's form with biases (2, 2.5) or normed heads (3) of queries and keys, or with experts too.

Sources: transformers' Qwen2Config, Qwen3Config and Qwen3MoeConfig with their models; llama.cpp's `qwen2`, `qwen3` and
`qwen3moe` architectures, whose query and key rows are stored for half-split rope.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.models import decoder, rope
from engine.models.blueprint import Blueprint, Description
from engine.models.decoder import GGUF_NAMES, HUGGINGFACE_NAMES
from engine.models.keys import Keys
from engine.models.spec import DecoderSpec

_DEFAULTS: Mapping[str, object] = {
    # What transformers takes where a config.json says nothing.
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_MOE_DEFAULTS: Mapping[str, object] = {
    **_DEFAULTS,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_window_layers": 0,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
}


def from_qwen2_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_gguf(description, "qwen2", normed=False)


def from_qwen3_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_gguf(description, "qwen3", normed=True)


def from_qwen3moe_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_gguf(description, "qwen3moe", normed=True)


def from_qwen2_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_config(description, "qwen2", {**_DEFAULTS, **description.config}, normed=False)


def from_qwen3_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_config(description, "qwen3", {**_DEFAULTS, "head_dim": 128, **description.config}, normed=True)


def from_qwen3_moe_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    # Here a window is of every layer.
    config = {**_MOE_DEFAULTS, **description.config, "max_window_layers": 0, "layer_types": None}
    return _from_config(description, "qwen3moe", config, normed=True, has_experts=True)


def to_config(spec: DecoderSpec) -> dict[str, object]:
    """See `registry.Writer`."""
    architecture, model_type = {
        "qwen2": ("Qwen2ForCausalLM", "qwen2"),
        "qwen3": ("Qwen3ForCausalLM", "qwen3"),
        "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    }[spec.family]
    config: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    if spec.qk_norm:
        config |= {"attention_bias": False}  # which the second has in any case
    if spec.num_experts:
        config |= {
            "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.experts_per_token,
            "moe_intermediate_size": spec.intermediate_size,
            "norm_topk_prob": spec.normalize_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _from_gguf(description: Description, family: str, *, normed: bool) -> Blueprint:
    keys = Keys(description.config, prefix=f"{family}.")
    decoder.need_neutral(keys, decoder.GGUF_NEUTRAL, "expert_count")
    has_experts = family == "qwen3moe"
    width = "expert_feed_forward_length" if has_experts else "feed_forward_length"
    sizes = decoder.sizes_from_gguf(keys, description, intermediate=width)
    keys.neutral("rope.dimension_count", sizes["head_dim"])
    keys.neutral("attention.sliding_window", 0)  # no file says which layers it is of
    num_experts, experts_per_token = decoder.experts_from_gguf(keys)
    if (num_experts > 0) != has_experts:
        raise keys.error("expert_count", "at least 1" if has_experts else "absent or 0")
    spec = DecoderSpec(
        family=family,
        **sizes,
        rope=rope.from_gguf(keys, sizes["head_dim"], None),
        qkv_bias=not normed,
        qk_norm=normed,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )
    return Blueprint(spec, decoder.recipes(spec, GGUF_NAMES))


def _from_config(
    description: Description, family: str, config: Mapping[str, object], *, normed: bool, has_experts: bool = False
) -> Blueprint:
    keys = Keys(config)
    decoder.need_float_causal_lm(keys)
    # Qwen 2 has its biases whatever a file says of them.
    decoder.need_neutral(keys, decoder.CONFIG_NEUTRAL, "layer_types", *(() if normed else ("attention_bias",)))
    if has_experts:
        keys.neutral("decoder_sparse_step", 1)
        if keys.get("mlp_only_layers") not in (None, []):
            raise keys.error("mlp_only_layers", "empty")
    width = "moe_intermediate_size" if has_experts else "intermediate_size"
    sizes = decoder.sizes_from_config(keys, description, intermediate=width)
    slides = keys.flag("use_sliding_window", default=False)
    first = keys.count("max_window_layers")
    spec = DecoderSpec(
        family=family,
        **sizes,
        rope=rope.from_huggingface(config, sizes["head_dim"]),
        qkv_bias=not normed,
        qk_norm=normed,
        windows=decoder.windows(
            sizes,
            decoder.window_from_config(keys) if slides else 0,
            decoder.sliding_layers(keys, sizes, lambda layer: layer >= first),
        ),
        num_experts=keys.count("num_experts", least=1) if has_experts else 0,
        experts_per_token=keys.count("num_experts_per_tok", least=1) if has_experts else 0,
        normalize_experts=keys.flag("norm_topk_prob", default=False) if has_experts else True,
    )
    return Blueprint(spec, decoder.recipes(spec, HUGGINGFACE_NAMES), decoder.ignored_in_folder(spec, description))
