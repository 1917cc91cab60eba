"""Phi 3, 3.5 and 4-mini: Llama's form with fused projections, windows, partly turned heads and long rope.

Sources: transformers' Phi3Config with its model; llama.cpp's `phi3` architecture, whose ffn_up holds gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import UnsupportedModelError
from engine.models import decoder, rope
from engine.models.blueprint import Blueprint, Description
from engine.models.decoder import GGUF_NAMES, HUGGINGFACE_NAMES
from engine.models.keys import Keys
from engine.models.spec import DecoderSpec

_DEFAULTS: Mapping[str, object] = {
    # What transformers takes where a config.json says nothing.
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def from_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    shapes = description.shapes
    keys = Keys(description.config, prefix="phi3.")
    decoder.need_neutral(keys, decoder.GGUF_NEUTRAL)
    sizes = decoder.sizes_from_gguf(keys, description)
    head_dim = sizes["head_dim"]
    turned = keys.count("rope.dimension_count", default=head_dim, least=2, most=head_dim)
    factors = frozenset({_LONG, _SHORT} & shapes.keys())
    if len(factors) == 1:
        raise UnsupportedModelError(f"{_LONG} and {_SHORT} must both be there or neither, found {next(iter(factors))}.")
    for name in sorted(factors):  # before they are read
        if shapes[name] != (turned // 2,):
            raise UnsupportedModelError(f"{name} must be a vector [{turned // 2}], found shape {list(shapes[name])}.")
    if factors:
        turn = rope.long_from_gguf(keys, turned, description.vector(_SHORT), description.vector(_LONG))
    else:
        turn = rope.from_gguf(keys, turned, None)
    spec = DecoderSpec(
        family="phi3",
        **sizes,
        rope=turn,
        windows=decoder.windows(sizes, keys.count("attention.sliding_window", default=0)),
    )
    return Blueprint(spec, decoder.recipes(spec, GGUF_NAMES, fused=True), factors)


def to_config(spec: DecoderSpec) -> dict[str, object]:
    """See `registry.Writer`."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_act": "silu",
        "sliding_window": max(spec.windows, default=0) or None,
        "original_max_position_embeddings": spec.rope.original_context or spec.max_position,
        "partial_rotary_factor": spec.rope.dim / spec.head_dim,
    }


def from_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    config = {**_DEFAULTS, **description.config}
    keys = Keys(config)
    for name in ("rope_scaling", "rope_parameters"):
        table = keys.table(name)
        for key in ("rope_type", "type"):
            if table.get(key) in ("su", "yarn"):  # early names of longrope, in this family alone
                table = {**table, key: "longrope"}
        if table:
            config[name] = table
    decoder.need_float_causal_lm(keys)
    decoder.need_neutral(keys, decoder.CONFIG_NEUTRAL)
    sizes = decoder.sizes_from_config(keys, description)
    spec = DecoderSpec(
        family="phi3",
        **sizes,
        rope=rope.from_huggingface(config, sizes["head_dim"], partial=True),
        windows=decoder.windows(sizes, decoder.window_from_config(keys)),
    )
    recipes = decoder.recipes(spec, HUGGINGFACE_NAMES, fused=True)
    return Blueprint(spec, recipes, decoder.ignored_in_folder(spec, description))
