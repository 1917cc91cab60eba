"""Llama as GGUF stores it: Llama 2 and 3, Mistral, SmolLM2, TinyLlama and other checkpoints of the same form.

Source: the GGUF specification's `llama` architecture, and the converter's permutation of query and key rows for
interleaved rope, which the recipes undo.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.errors import UnsupportedModelError
from engine.models.recipe import Part, Recipe
from engine.models.spec import GROUP_SIZE, DecoderSpec, RopeSpec

_PREFIX = "llama."
_TENSORS_PER_LAYER = 9

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # Keys that change the arithmetic, with the values under which they change nothing.
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scale_linear": (0.0, 1.0),
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "use_parallel_residual": (False,),
}


def read_spec(metadata: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]) -> DecoderSpec:
    """See `registry.Family.read_spec`."""
    keys = _Keys(metadata)
    for key, allowed in _NEUTRAL.items():
        value = metadata.get(_PREFIX + key)
        if value is not None and (isinstance(value, (list, np.ndarray)) or value not in allowed):
            raise UnsupportedModelError(
                f"{_PREFIX}{key} must be {_listed(allowed)}, the checkpoint has {_shown(value)}: it is not supported."
            )
    if "rope_freqs.weight" in shapes:
        raise UnsupportedModelError("rope scaling by frequency factors (tensor rope_freqs.weight) is not supported.")

    num_layers = keys.count("block_count")
    if _TENSORS_PER_LAYER * num_layers > len(shapes):
        raise UnsupportedModelError(
            f"llama.block_count is {num_layers}, which takes {_TENSORS_PER_LAYER * num_layers} tensors and more, "
            f"but the checkpoint has {len(shapes)}."
        )
    hidden_size = keys.count("embedding_length")
    num_heads = keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", default=hidden_size // num_heads if num_heads else 0)
    value_dim = keys.count("attention.value_length", default=head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(f"llama.attention.value_length must be key_length {head_dim}, got {value_dim}.")
    embed = shapes.get("token_embd.weight")
    if embed is None or len(embed) != 2:
        found = "no such tensor" if embed is None else f"shape {list(embed)}"
        raise UnsupportedModelError(f"token_embd.weight must be a matrix [vocabulary, {hidden_size}], found {found}.")
    vocab_size = keys.count("vocab_size", default=embed[0])
    if vocab_size != embed[0]:
        raise UnsupportedModelError(f"llama.vocab_size is {vocab_size}, but token_embd.weight has {embed[0]} rows.")

    return DecoderSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        intermediate_size=keys.count("feed_forward_length"),
        vocab_size=vocab_size,
        max_position=keys.count("context_length"),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=RopeSpec(
            theta=keys.positive("rope.freq_base", default=10000.0),
            dim=keys.count("rope.dimension_count", default=head_dim),
        ),
        tie_embeddings="output.weight" not in shapes,
    )


def recipes(spec: DecoderSpec) -> list[Recipe]:
    """See `registry.Family.recipes`."""
    hidden, ffn, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    made = [Recipe("embed", (Part("token_embd.weight", (vocab, hidden)),))]
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}.", f"blk.{i}."
        made += [
            Recipe(ours + "attn_norm", (Part(theirs + "attn_norm.weight", (hidden,)),)),
            Recipe(
                ours + "qkv",
                (
                    Part(theirs + "attn_q.weight", (spec.q_size, hidden), interleaved_heads=spec.num_heads),
                    Part(theirs + "attn_k.weight", (spec.kv_size, hidden), interleaved_heads=spec.num_kv_heads),
                    Part(theirs + "attn_v.weight", (spec.kv_size, hidden)),
                ),
            ),
            Recipe(ours + "o", (Part(theirs + "attn_output.weight", (hidden, spec.q_size)),)),
            Recipe(ours + "ffn_norm", (Part(theirs + "ffn_norm.weight", (hidden,)),)),
            Recipe(
                ours + "gate_up",
                (Part(theirs + "ffn_gate.weight", (ffn, hidden)), Part(theirs + "ffn_up.weight", (ffn, hidden))),
                block=GROUP_SIZE,
            ),
            Recipe(ours + "down", (Part(theirs + "ffn_down.weight", (hidden, ffn)),)),
        ]
    made.append(Recipe("final_norm", (Part("output_norm.weight", (hidden,)),)))
    if not spec.tie_embeddings:
        made.append(Recipe("head", (Part("output.weight", (vocab, hidden)),)))
    return made


class _Keys:
    """Typed access to the `llama.` keys of GGUF metadata."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def count(self, key: str, default: int | None = None) -> int:
        """A non-negative integer; an array with one value per layer is taken where all are equal."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.ndim == 1 and len(value) and bool((value == value[0]).all()):
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UnsupportedModelError(f"{_PREFIX}{key} must be one non-negative integer, got {_shown(value)}.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < float("inf"):
            raise UnsupportedModelError(f"{_PREFIX}{key} must be a positive number, got {_shown(value)}.")
        return float(value)

    def _get(self, key: str, default: object) -> object:
        value = self._metadata.get(_PREFIX + key, default)
        if value is None:
            raise UnsupportedModelError(f"the checkpoint's metadata lack {_PREFIX}{key}.")
        return value


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(repr(value) for value in values)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
