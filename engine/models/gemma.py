"""Gemma 2 and 3: norms before and after, GELU, scaled embeddings, and windows on most layers; soft caps (2) or normed
heads and a rope of their own for layers with a window (3).

Sources: transformers' Gemma2Config and Gemma3TextConfig with their models; llama.cpp's `gemma2` and `gemma3`
architectures, whose norms are stored with their one added and whose query and key rows are for half-split rope.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from engine.models import decoder, rope
from engine.models.blueprint import Blueprint, Description
from engine.models.decoder import GGUF_NAMES
from engine.models.keys import Keys
from engine.models.spec import DecoderSpec, RopeSpec

_HUGGINGFACE_NAMES: Mapping[str, str] = {
    **decoder.HUGGINGFACE_NAMES,
    "post_attn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "post_ffn_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}

_GEMMA2_DEFAULTS: Mapping[str, object] = {
    # What transformers takes where a config.json says nothing.
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}

_GEMMA3_DEFAULTS: Mapping[str, object] = {
    **_GEMMA2_DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}

_LOCAL_THETA = 10000.0

_LARGEST_LAYERS = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, which scale their queries by the hidden size that a head has a share of, not by its own
size. GGUF files have no key for that."""


def from_gemma2_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_gguf(description, "gemma2", every=2)


def from_gemma3_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_gguf(description, "gemma3", every=6)


def from_gemma2_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    config = {**_GEMMA2_DEFAULTS, **description.config}
    return _from_config(description, config, "gemma2", every=2)


def from_gemma3_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    config = {**_GEMMA3_DEFAULTS, **description.config}
    return _from_config(description, config, "gemma3", every=Keys(config).count("sliding_window_pattern", least=1))


def to_config(spec: DecoderSpec) -> dict[str, object]:
    """See `registry.Writer`."""
    third = spec.local_rope is not None
    assert spec.attention_scale is not None
    config: dict[str, object] = {
        "architectures": ["Gemma3ForCausalLM" if third else "Gemma2ForCausalLM"],
        "model_type": "gemma3_text" if third else "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": round(spec.attention_scale**-2),
        "attn_logit_softcapping": spec.attention_softcap or None,
        "final_logit_softcapping": spec.final_softcap or None,
        "sliding_window": max(spec.windows),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in spec.windows],
    }
    if spec.local_rope is not None:
        config |= {"rope_local_base_freq": spec.local_rope.theta}
    return config


def _from_gguf(description: Description, family: str, *, every: int) -> Blueprint:
    """`every` so many layers one has no window."""
    keys = Keys(description.config, prefix=f"{family}.")
    decoder.need_neutral(keys, decoder.GGUF_NEUTRAL, "attn_logit_softcapping", "final_logit_softcapping")
    sizes = decoder.sizes_from_gguf(keys, description)
    head_dim, hidden_size = sizes["head_dim"], sizes["hidden_size"]
    keys.neutral("rope.dimension_count", head_dim)
    keys.neutral("attention.sliding_window_pattern", every)
    largest = sizes["num_layers"] == _LARGEST_LAYERS[family]
    third = family == "gemma3"
    whole_rope = rope.from_gguf(keys, head_dim, None, default_theta=1e6 if third else rope.DEFAULT_THETA)
    local_theta = keys.positive("rope.freq_base_swa", default=_LOCAL_THETA)
    spec = DecoderSpec(
        family=family,
        **sizes,
        rope=whole_rope,
        activation="gelu_tanh",
        qk_norm=third,
        post_norms=True,
        embedding_scale=math.sqrt(hidden_size),
        attention_scale=(hidden_size / sizes["num_heads"] if largest else head_dim) ** -0.5,
        # What llama.cpp takes where a file of the second says nothing.
        attention_softcap=_softcap(keys, "attn_logit_softcapping", default=0.0 if third else 50.0),
        final_softcap=_softcap(keys, "final_logit_softcapping", default=0.0 if third else 30.0),
        windows=decoder.sliding(
            sizes, keys.count("attention.sliding_window", least=1), lambda layer: (layer + 1) % every != 0
        ),
        local_rope=RopeSpec(theta=local_theta, dim=head_dim) if third else None,
    )
    return Blueprint(spec, decoder.recipes(spec, GGUF_NAMES))


def _from_config(description: Description, config: Mapping[str, object], family: str, *, every: int) -> Blueprint:
    keys = Keys(config)
    decoder.need_float_causal_lm(keys)
    decoder.need_neutral(keys, decoder.CONFIG_NEUTRAL, "layer_types", "hidden_act")
    keys.neutral("hidden_activation", "gelu_pytorch_tanh")
    keys.neutral("use_bidirectional_attention", False)
    sizes = decoder.sizes_from_config(keys, description, tied=True)
    head_dim = sizes["head_dim"]
    third = family == "gemma3"
    whole_rope, local_rope = _ropes(config, head_dim) if third else (rope.from_huggingface(config, head_dim), None)
    spec = DecoderSpec(
        family=family,
        **sizes,
        rope=whole_rope,
        activation="gelu_tanh",
        qk_norm=third,
        post_norms=True,
        embedding_scale=math.sqrt(sizes["hidden_size"]),
        attention_scale=keys.positive("query_pre_attn_scalar") ** -0.5,
        attention_softcap=_softcap(keys, "attn_logit_softcapping"),
        final_softcap=_softcap(keys, "final_logit_softcapping"),
        windows=decoder.sliding(
            sizes,
            keys.count("sliding_window", least=1),
            decoder.sliding_layers(keys, sizes, lambda layer: (layer + 1) % every != 0),
        ),
        local_rope=local_rope,
    )
    recipes = decoder.recipes(spec, _HUGGINGFACE_NAMES, norm_plus=1.0)
    return Blueprint(spec, recipes, decoder.ignored_in_folder(spec, description))


def _ropes(config: Mapping[str, object], head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """Of layers without and with a window. transformers 5 writes a table for either kind of layer, earlier versions
    wrote `rope_theta`, `rope_scaling` (of the former alone) and `rope_local_base_freq`."""
    keys = Keys(config)
    tables = Keys(keys.table("rope_parameters"))
    if keys.get("rope_parameters") and not (tables.get("full_attention") or tables.get("sliding_attention")):
        raise keys.error("rope_parameters", "an object with full_attention and sliding_attention")
    bare = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}

    def made(kind: str, theta: str, scaling: Mapping[str, object]) -> RopeSpec:
        table = {"rope_theta": keys.positive(theta), **tables.table(kind), **scaling}
        return rope.from_huggingface({**bare, "rope_parameters": table}, head_dim)

    return (
        made("full_attention", "rope_theta", keys.table("rope_scaling")),
        made("sliding_attention", "rope_local_base_freq", {}),
    )


def _softcap(keys: Keys, key: str, *, default: float = 0.0) -> float:
    """0 where there is none."""
    value = keys.get(key)
    if value is None:
        return default
    return 0.0 if isinstance(value, (int, float)) and value == 0 else keys.positive(key)
