"""Llama and what has its form: Llama 2 and 3, Mistral, SmolLM2, TinyLlama.

Sources: the GGUF specification's `llama` architecture with the converter's permutation of query and key rows for
interleaved rope, which the recipes undo; transformers' LlamaConfig and MistralConfig.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from engine.errors import UnsupportedModelError
from engine.models import rope
from engine.models.blueprint import Blueprint, Description
from engine.models.keys import Keys, shown
from engine.models.recipe import Part, Recipe
from engine.models.spec import GROUP_SIZE, DecoderSpec

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 1024
"""Far above any model's; rope's tables have this size before a tensor's shape is compared with it."""

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

_CONFIG_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # The same for config.json.
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "num_local_experts": (0,),
    "layer_types": (),
}

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

_TENSORS_PER_LAYER = 9


def from_gguf(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    shapes = description.shapes
    keys = Keys(description.config, prefix="llama.")
    for key, allowed in _GGUF_NEUTRAL.items():
        keys.neutral(key, *allowed)
    num_layers = _num_layers(keys, "block_count", shapes)
    hidden_size = keys.count("embedding_length", least=1)
    num_heads = keys.count("attention.head_count", least=1)
    head_dim = _head_dim(keys, "attention.key_length", hidden_size, num_heads)
    keys.neutral("attention.value_length", head_dim)
    keys.neutral("rope.dimension_count", head_dim)
    context = keys.count("context_length")
    window = keys.count("attention.sliding_window", default=0)  # 0: none
    has_factors = _ROPE_FREQS in shapes
    if has_factors and shapes[_ROPE_FREQS] != (head_dim // 2,):  # before it is read
        raise UnsupportedModelError(
            f"{_ROPE_FREQS} must be a vector [{head_dim // 2}], found shape {list(shapes[_ROPE_FREQS])}."
        )
    spec = DecoderSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", default=num_heads, least=1),
        head_dim=head_dim,
        intermediate_size=keys.count("feed_forward_length"),
        vocab_size=_vocab_size(keys, shapes, _GGUF_NAMES["embed"], hidden_size),
        max_position=_within(context, window),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        rope=rope.from_gguf(keys, head_dim, description.vector(_ROPE_FREQS) if has_factors else None),
        tie_embeddings=_GGUF_NAMES["head"] not in shapes,
    )
    ignored = frozenset({_ROPE_FREQS} if has_factors else ())
    return Blueprint(spec, _recipes(spec, _GGUF_NAMES, interleaved=True), ignored)


def from_llama_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    # transformers' Llama has no sliding window, whatever the file says.
    return _from_config(description, {**_LLAMA_DEFAULTS, **description.config, "sliding_window": None})


def from_mistral_config(description: Description) -> Blueprint:
    """See `registry.Reader`."""
    return _from_config(description, {**_MISTRAL_DEFAULTS, **description.config})


def _from_config(description: Description, config: Mapping[str, object]) -> Blueprint:
    """`config` is config.json with transformers' defaults for what it leaves out; null is not left out."""
    shapes = description.shapes
    keys = Keys(config)
    _need_float_causal_lm(keys)
    for key, allowed in _CONFIG_NEUTRAL.items():
        keys.neutral(key, *allowed)
    num_layers = _num_layers(keys, "num_hidden_layers", shapes)
    hidden_size = keys.count("hidden_size", least=1)
    num_heads = keys.count("num_attention_heads", least=1)
    head_dim = _head_dim(keys, "head_dim", hidden_size, num_heads)
    context = keys.count("max_position_embeddings")
    window = 0 if keys.get("sliding_window") is None else keys.count("sliding_window", least=1)
    head = _HUGGINGFACE_NAMES["head"]
    spec = DecoderSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", default=num_heads, least=1),
        head_dim=head_dim,
        intermediate_size=keys.count("intermediate_size"),
        vocab_size=_vocab_size(keys, shapes, _HUGGINGFACE_NAMES["embed"], hidden_size),
        max_position=_within(context, window),
        norm_eps=keys.positive("rms_norm_eps"),
        rope=rope.from_huggingface(config, head_dim),
        tie_embeddings=_is_tied(keys, description),
    )
    # Frequencies that early checkpoints stored beside their weights, and a copy of the embedding as the head.
    ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(num_layers)}
    if spec.tie_embeddings:
        ignored.add(head)
    return Blueprint(spec, _recipes(spec, _HUGGINGFACE_NAMES, interleaved=False), frozenset(ignored & shapes.keys()))


def _need_float_causal_lm(keys: Keys) -> None:
    architectures = keys.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list)
        and any(isinstance(name, str) and name.endswith("ForCausalLM") for name in architectures)
    ):
        raise keys.error("architectures", "a list with a ...ForCausalLM: only these write text")
    for key in ("quantization_config", "compression_config"):
        if keys.get(key) is not None:
            method = keys.table(key).get("quant_method")
            raise UnsupportedModelError(
                f"{key} must be absent, the checkpoint has quant_method {shown(method)}: weights that are stored "
                "quantized are read from GGUF files, from safetensors only F32, F16 and BF16."
            )


def _is_tied(keys: Keys, description: Description) -> bool:
    """Whether the embedding is the head too. A head of its own counts even where the configuration denies it."""
    embed, head = _HUGGINGFACE_NAMES["embed"], _HUGGINGFACE_NAMES["head"]
    if not keys.flag("tie_word_embeddings", default=False):
        if head not in description.shapes:
            said = "absent, which is false" if keys.get("tie_word_embeddings") is None else "false"
            raise UnsupportedModelError(
                f"{head} must be there where tie_word_embeddings is {said}: without it the checkpoint has no head."
            )
        return False
    if head not in description.shapes or description.same(embed, head):
        return True
    logger.warning("tie_word_embeddings is true, but %s is not %s: both are used", head, embed)
    return False


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
    num_layers = keys.count(key, least=1)
    needed = _TENSORS_PER_LAYER * num_layers
    if needed > len(shapes):
        raise UnsupportedModelError(
            f"{keys.name(key)} is {num_layers}, which takes {needed} tensors and more, but the checkpoint has "
            f"{len(shapes)}."
        )
    return num_layers


def _head_dim(keys: Keys, key: str, hidden_size: int, num_heads: int) -> int:
    """What the checkpoint says, else an equal share of the hidden size for each head."""
    if keys.get(key) is None and hidden_size % num_heads:
        raise UnsupportedModelError(
            f"the hidden size must be a multiple of the {num_heads} heads where {keys.name(key)} is missing, "
            f"got {hidden_size}."
        )
    return keys.count(key, default=hidden_size // num_heads, least=1, most=MAX_HEAD_DIM)


def _vocab_size(keys: Keys, shapes: Mapping[str, tuple[int, ...]], embedding: str, hidden_size: int) -> int:
    """The rows of the embedding, which a `vocab_size` must name."""
    embed = shapes.get(embedding)
    if embed is None or len(embed) != 2:
        found = "no such tensor" if embed is None else f"shape {list(embed)}"
        raise UnsupportedModelError(f"{embedding} must be a matrix [vocabulary, {hidden_size}], found {found}.")
    vocab_size = keys.count("vocab_size", default=embed[0])
    if vocab_size != embed[0]:
        raise UnsupportedModelError(f"{keys.name('vocab_size')} is {vocab_size}, but {embedding} has {embed[0]} rows.")
    return vocab_size


def _within(context: int, window: int) -> int:
    """The context, cut to a sliding window where there is one: within its first length a window hides nothing."""
    return min(context, window) if window else context
