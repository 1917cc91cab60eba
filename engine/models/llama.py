"""Llama and what has its form: Llama 2 and 3, Mistral, Mixtral, SmolLM2, TinyLlama.

Sources: the GGUF specification's `llama` architecture with the converter's permutation of query and key rows for
interleaved rope, which the recipes undo; transformers' LlamaConfig, MistralConfig and MixtralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import UnsupportedModelError
from engine.models import decoder, rope
from engine.models.blueprint import Blueprint, Description
from engine.models.decoder import GGUF_NAMES, HUGGINGFACE_NAMES
from engine.models.keys import Keys
from engine.models.spec import DecoderSpec

_LLAMA_DEFAULTS: Mapping[str, object] = {
    # What transformers takes where a config.json says nothing.
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}

_MISTRAL_DEFAULTS: Mapping[str, object] = {
    **_LLAMA_DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}

_MIXTRAL_DEFAULTS: Mapping[str, object] = {
    **_MISTRAL_DEFAULTS,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
}

_MIXTRAL_NAMES: Mapping[str, str] = {
    **HUGGINGFACE_NAMES,
    "router": "model.layers.{}.block_sparse_moe.gate.weight",
    "expert_gate": "model.layers.{}.block_sparse_moe.experts.{}.w1.weight",
    "expert_up": "model.layers.{}.block_sparse_moe.experts.{}.w3.weight",
    "expert_down": "model.layers.{}.block_sparse_moe.experts.{}.w2.weight",
}

_ROPE_FREQS = "rope_freqs.weight"


def from_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    shapes = description.shapes
    keys = Keys(description.config, prefix="llama.")
    decoder.need_neutral(keys, decoder.GGUF_NEUTRAL, "expert_count")
    sizes = decoder.sizes_from_gguf(keys, description)
    head_dim = sizes["head_dim"]
    keys.neutral("rope.dimension_count", head_dim)
    num_experts, experts_per_token = decoder.experts_from_gguf(keys)
    has_factors = _ROPE_FREQS in shapes
    if has_factors and shapes[_ROPE_FREQS] != (head_dim // 2,):  # before it is read
        raise UnsupportedModelError(
            f"{_ROPE_FREQS} must be a vector [{head_dim // 2}], found shape {list(shapes[_ROPE_FREQS])}."
        )
    spec = DecoderSpec(
        family="llama",
        **sizes,
        rope=rope.from_gguf(keys, head_dim, description.vector(_ROPE_FREQS) if has_factors else None),
        windows=decoder.windows(sizes, keys.count("attention.sliding_window", default=0)),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )
    ignored = frozenset({_ROPE_FREQS} if has_factors else ())
    return Blueprint(spec, decoder.recipes(spec, GGUF_NAMES, interleaved=True), ignored)


def from_llama_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    # transformers' Llama has no sliding window, whatever the file says.
    return _from_config(description, {**_LLAMA_DEFAULTS, **description.config, "sliding_window": None})


def from_mistral_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_config(description, {**_MISTRAL_DEFAULTS, **description.config})


def from_mixtral_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_config(description, {**_MIXTRAL_DEFAULTS, **description.config}, names=_MIXTRAL_NAMES)


def to_config(spec: DecoderSpec) -> dict[str, object]:
    """See `registry.Writer`."""
    config: dict[str, object] = {"hidden_act": "silu", "sliding_window": spec.window(0) or None}  # of every layer
    if spec.num_experts:
        experts = {"num_local_experts": spec.num_experts, "num_experts_per_tok": spec.experts_per_token}
        return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **config, **experts}
    if spec.windows:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **config}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _from_config(
    description: Description, config: Mapping[str, object], *, names: Mapping[str, str] = HUGGINGFACE_NAMES
) -> Blueprint:
    """`config` is config.json with transformers' defaults for what it leaves out; null is not left out."""
    keys = Keys(config)
    decoder.need_float_causal_lm(keys)
    has_experts = names is _MIXTRAL_NAMES
    decoder.need_neutral(keys, decoder.CONFIG_NEUTRAL, *(("num_local_experts",) if has_experts else ()))
    sizes = decoder.sizes_from_config(keys, description)
    spec = DecoderSpec(
        family="llama",
        **sizes,
        rope=rope.from_huggingface(config, sizes["head_dim"]),
        windows=decoder.windows(sizes, decoder.window_from_config(keys)),
        num_experts=keys.count("num_local_experts", least=1) if has_experts else 0,
        experts_per_token=keys.count("num_experts_per_tok", least=1) if has_experts else 0,
    )
    return Blueprint(spec, decoder.recipes(spec, names), decoder.ignored_in_folder(spec, description))
