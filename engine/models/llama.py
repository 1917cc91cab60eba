"""Llama and what has its form: Llama 2 and 3, Mistral, SmolLM2, TinyLlama.

Sources: the GGUF specification's `llama` architecture with the converter's permutation of query and key rows for
interleaved rope, which the recipes undo; the configurations of transformers' LlamaConfig and MistralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.errors import UnsupportedModelError
from engine.models import rope
from engine.models.blueprint import Blueprint, Description
from engine.models.keys import Keys
from engine.models.recipe import Part, Recipe
from engine.models.spec import GROUP_SIZE, DecoderSpec

_TENSORS_PER_LAYER = 9

_GGUF_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # Keys that change the arithmetic, with the values under which they change nothing.
    "rope.scaling.attn_factor": (1.0,),
    "expert_count": (0,),
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

_HUGGINGFACE_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "num_local_experts": (0,),
    "quantization_config": (),
}

_GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "ffn_norm": "blk.{}.ffn_norm.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}

_HUGGINGFACE_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}

_ROPE_FREQS = "rope_freqs.weight"


def from_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    shapes = description.shapes
    keys = Keys(description.config, prefix="llama.")
    for key, allowed in _GGUF_NEUTRAL.items():
        keys.neutral(key, *allowed)
    num_layers = _num_layers(keys, "block_count", shapes)
    hidden_size = keys.count("embedding_length")
    num_heads = keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", default=hidden_size // num_heads if num_heads else 0)
    value_dim = keys.count("attention.value_length", default=head_dim)
    if value_dim != head_dim:
        raise UnsupportedModelError(f"llama.attention.value_length must be key_length {head_dim}, got {value_dim}.")
    has_factors = _ROPE_FREQS in shapes
    spec = DecoderSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", default=num_heads),
        head_dim=head_dim,
        intermediate_size=keys.count("feed_forward_length"),
        vocab_size=_vocab_size(keys, "vocab_size", shapes, _GGUF_NAMES["embed"], hidden_size),
        max_position=_max_position(keys, "context_length", "attention.sliding_window"),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=rope.from_gguf(
            keys,
            keys.count("rope.dimension_count", default=head_dim),
            description.vector(_ROPE_FREQS) if has_factors else None,
        ),
        tie_embeddings=_GGUF_NAMES["head"] not in shapes,
    )
    ignored = frozenset({_ROPE_FREQS} if has_factors else ())
    return Blueprint(spec, _recipes(spec, _GGUF_NAMES, interleaved=True), ignored)


def from_huggingface(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    shapes = description.shapes
    keys = Keys(description.config)
    for key, allowed in _HUGGINGFACE_NEUTRAL.items():
        keys.neutral(key, *allowed)
    num_layers = _num_layers(keys, "num_hidden_layers", shapes)
    hidden_size = keys.count("hidden_size")
    num_heads = keys.count("num_attention_heads")
    head_dim = keys.count("head_dim", default=hidden_size // num_heads if num_heads else 0)
    tied = keys.flag("tie_word_embeddings", default=False)
    spec = DecoderSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        intermediate_size=keys.count("intermediate_size"),
        vocab_size=_vocab_size(keys, "vocab_size", shapes, _HUGGINGFACE_NAMES["embed"], hidden_size),
        max_position=_max_position(keys, "max_position_embeddings", "sliding_window"),
        norm_eps=keys.positive("rms_norm_eps"),
        rope=rope.from_huggingface(description.config, head_dim),
        tie_embeddings=tied,
    )
    # Frequencies that early checkpoints stored beside their weights, and a copy of the embedding under the head's name.
    ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(num_layers)}
    if tied:
        ignored.add(_HUGGINGFACE_NAMES["head"])
    return Blueprint(spec, _recipes(spec, _HUGGINGFACE_NAMES, interleaved=False), frozenset(ignored & shapes.keys()))


def _recipes(spec: DecoderSpec, names: Mapping[str, str], *, interleaved: bool) -> tuple[Recipe, ...]:
    """Our tensors from theirs. `interleaved`: query and key rows are stored for interleaved rope."""
    hidden, ffn, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    made = [Recipe("embed", (Part(names["embed"], (vocab, hidden)),))]
    for i in range(spec.num_layers):

        def part(name: str, *shape: int, heads: int = 0, layer: int = i) -> Part:
            return Part(names[name].format(layer), shape, interleaved_heads=heads if interleaved else 0)

        ours = f"layers.{i}."
        made += [
            Recipe(ours + "attn_norm", (part("attn_norm", hidden),)),
            Recipe(
                ours + "qkv",
                (
                    part("q", spec.q_size, hidden, heads=spec.num_heads),
                    part("k", spec.kv_size, hidden, heads=spec.num_kv_heads),
                    part("v", spec.kv_size, hidden),
                ),
            ),
            Recipe(ours + "o", (part("o", hidden, spec.q_size),)),
            Recipe(ours + "ffn_norm", (part("ffn_norm", hidden),)),
            Recipe(ours + "gate_up", (part("gate", ffn, hidden), part("up", ffn, hidden)), block=GROUP_SIZE),
            Recipe(ours + "down", (part("down", hidden, ffn),)),
        ]
    made.append(Recipe("final_norm", (Part(names["final_norm"], (hidden,)),)))
    if not spec.tie_embeddings:
        made.append(Recipe("head", (Part(names["head"], (vocab, hidden)),)))
    return tuple(made)


def _num_layers(keys: Keys, key: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Compared with the tensors there are before anything is made for each layer."""
    num_layers = keys.count(key)
    if _TENSORS_PER_LAYER * num_layers > len(shapes):
        raise UnsupportedModelError(
            f"{keys.name(key)} is {num_layers}, which takes {_TENSORS_PER_LAYER * num_layers} tensors and more, "
            f"but the checkpoint has {len(shapes)}."
        )
    return num_layers


def _vocab_size(keys: Keys, key: str, shapes: Mapping[str, tuple[int, ...]], embedding: str, hidden_size: int) -> int:
    embed = shapes.get(embedding)
    if embed is None or len(embed) != 2:
        found = "no such tensor" if embed is None else f"shape {list(embed)}"
        raise UnsupportedModelError(f"{embedding} must be a matrix [vocabulary, {hidden_size}], found {found}.")
    vocab_size = keys.count(key, default=embed[0])
    if vocab_size != embed[0]:
        raise UnsupportedModelError(f"{keys.name(key)} is {vocab_size}, but {embedding} has {embed[0]} rows.")
    return vocab_size


def _max_position(keys: Keys, key: str, window_key: str) -> int:
    """The context, cut to the sliding window of checkpoints that have one: within it a window hides nothing."""
    context, window = keys.count(key), keys.count(window_key, default=0)
    return min(context, window) if window else context
