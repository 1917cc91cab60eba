"""What the families of decoders have in common: names of tensors, recipes, and the checks of a configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypedDict

from engine.errors import UnsupportedModelError
from engine.models.blueprint import Description
from engine.models.keys import Keys, shown
from engine.models.recipe import Part, Recipe
from engine.models.spec import GROUP_SIZE, DecoderSpec

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 1024
"""Far above any model's; rope's tables have this size before a tensor's shape is compared with it."""

GGUF_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # Keys that change the arithmetic, with the values under which they change nothing.
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

CONFIG_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # The same for config.json.
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "num_local_experts": (0,),
    "layer_types": (),
}

GGUF_NAMES: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "qkv": "blk.{}.attn_qkv.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "q_bias": "blk.{}.attn_q.bias",
    "k_bias": "blk.{}.attn_k.bias",
    "v_bias": "blk.{}.attn_v.bias",
    "q_norm": "blk.{}.attn_q_norm.weight",
    "k_norm": "blk.{}.attn_k_norm.weight",
    "o": "blk.{}.attn_output.weight",
    "post_attn_norm": "blk.{}.post_attention_norm.weight",
    "ffn_norm": "blk.{}.ffn_norm.weight",
    "gate_up": "blk.{}.ffn_up.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
    "post_ffn_norm": "blk.{}.post_ffw_norm.weight",
    "router": "blk.{}.ffn_gate_inp.weight",
    "expert_gate": "blk.{}.ffn_gate_exps.weight",
    "expert_up": "blk.{}.ffn_up_exps.weight",
    "expert_down": "blk.{}.ffn_down_exps.weight",
}
"""Our parts as GGUF names them, in every architecture."""

HUGGINGFACE_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "qkv": "model.layers.{}.self_attn.qkv_proj.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate_up": "model.layers.{}.mlp.gate_up_proj.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "router": "model.layers.{}.mlp.gate.weight",
    "expert_gate": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "expert_up": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "expert_down": "model.layers.{}.mlp.experts.{}.down_proj.weight",
}
"""The same in transformers, as most families name them."""

_TENSORS_PER_LAYER = 6  # of the families with the fewest


class Sizes(TypedDict):
    """What every family's configuration says, by the names of DecoderSpec."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    tie_embeddings: bool


def sizes_from_gguf(keys: Keys, description: Description, *, intermediate: str = "feed_forward_length") -> Sizes:
    """`intermediate`: the key of the feed-forward's width."""
    shapes = description.shapes
    num_layers = _num_layers(keys, "block_count", shapes)
    hidden_size = keys.count("embedding_length", least=1)
    num_heads = keys.count("attention.head_count", least=1)
    head_dim = _head_dim(keys, "attention.key_length", hidden_size, num_heads)
    keys.neutral("attention.value_length", head_dim)
    return Sizes(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("attention.head_count_kv", default=num_heads, least=1),
        head_dim=head_dim,
        intermediate_size=keys.count(intermediate),
        vocab_size=_vocab_size(keys, shapes, GGUF_NAMES["embed"], hidden_size),
        max_position=keys.count("context_length"),
        norm_eps=keys.positive("attention.layer_norm_rms_epsilon"),
        tie_embeddings=GGUF_NAMES["head"] not in shapes,
    )


def sizes_from_config(
    keys: Keys, description: Description, *, intermediate: str = "intermediate_size", tied: bool = False
) -> Sizes:
    """`tied`: whether the embedding is the head where a config.json does not say."""
    shapes = description.shapes
    num_layers = _num_layers(keys, "num_hidden_layers", shapes)
    hidden_size = keys.count("hidden_size", least=1)
    num_heads = keys.count("num_attention_heads", least=1)
    return Sizes(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", default=num_heads, least=1),
        head_dim=_head_dim(keys, "head_dim", hidden_size, num_heads),
        intermediate_size=keys.count(intermediate),
        vocab_size=_vocab_size(keys, shapes, HUGGINGFACE_NAMES["embed"], hidden_size),
        max_position=keys.count("max_position_embeddings"),
        norm_eps=keys.positive("rms_norm_eps"),
        tie_embeddings=_is_tied(keys, description, default=tied),
    )


def to_config(spec: DecoderSpec) -> dict[str, object]:
    """What `sizes_from_config` reads, for a config.json."""
    return {
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
    }


def recipes(
    spec: DecoderSpec,
    names: Mapping[str, str],
    *,
    interleaved: bool = False,
    norm_plus: float = 0.0,
    fused: bool = False,
) -> tuple[Recipe, ...]:
    """Our tensors from theirs.

    `interleaved`: query and key rows are stored for interleaved rope. `norm_plus`: what norms multiply by beside their
    stored weights. `fused`: queries, keys and values are one tensor, and so are gate and up.
    """
    hidden, ffn, vocab = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    made = [Recipe("embed", (Part(names["embed"], (vocab, hidden)),))]
    for i in range(spec.num_layers):

        def part(name: str, *shape: int, heads: int = 0, layer: int = i) -> Part:
            return Part(names[name].format(layer), shape, interleaved_heads=heads if interleaved else 0)

        def norm(name: str, size: int, layer: int = i) -> Recipe:
            return Recipe(f"layers.{layer}.{name}", (Part(names[name].format(layer), (size,), plus=norm_plus),))

        def slices(name: str, *rows: int, layer: int = i) -> tuple[Part, ...]:
            tensor, total = names[name].format(layer), sum(rows)
            starts = (sum(rows[:n]) for n in range(len(rows)))
            return tuple(
                Part(tensor, (count, hidden), first_row=start, stored=(total, hidden))
                for start, count in zip(starts, rows, strict=True)
            )

        ours = f"layers.{i}."
        qkv = slices("qkv", spec.q_size, spec.kv_size, spec.kv_size) if fused else (
            part("q", spec.q_size, hidden, heads=spec.num_heads),
            part("k", spec.kv_size, hidden, heads=spec.num_kv_heads),
            part("v", spec.kv_size, hidden),
        )  # fmt: skip
        made += [norm("attn_norm", hidden), Recipe(ours + "qkv", qkv)]
        if spec.qkv_bias:
            biases = (part("q_bias", spec.q_size), part("k_bias", spec.kv_size), part("v_bias", spec.kv_size))
            made.append(Recipe(ours + "qkv_bias", biases))
        if spec.qk_norm:
            made += [norm("q_norm", spec.head_dim), norm("k_norm", spec.head_dim)]
        made.append(Recipe(ours + "o", (part("o", hidden, spec.q_size),)))
        if spec.post_norms:
            made += [norm("post_attn_norm", hidden), norm("post_ffn_norm", hidden)]
        made.append(norm("ffn_norm", hidden))
        if spec.num_experts:
            made += _experts(spec, names, i)
            continue
        gate_up = slices("gate_up", ffn, ffn) if fused else (part("gate", ffn, hidden), part("up", ffn, hidden))
        made.append(Recipe(ours + "gate_up", gate_up, block=GROUP_SIZE))
        made.append(Recipe(ours + "down", (part("down", hidden, ffn),)))
    made.append(Recipe("final_norm", (Part(names["final_norm"], (hidden,), plus=norm_plus),)))
    if not spec.tie_embeddings:
        made.append(Recipe("head", (Part(names["head"], (vocab, hidden)),)))
    return tuple(made)


def _experts(spec: DecoderSpec, names: Mapping[str, str], layer: int) -> list[Recipe]:
    """The router and the experts of a layer. Experts lie one after another in one tensor, or in tensors of their own,
    whose names then have a second place, for their number."""
    hidden, ffn, count = spec.hidden_size, spec.intermediate_size, spec.num_experts
    made = [Recipe(f"layers.{layer}.router", (Part(names["router"].format(layer), (count, hidden)),))]

    def part(name: str, rows: int, inputs: int, expert: int) -> Part:
        if names[name].count("{}") == 2:
            return Part(names[name].format(layer, expert), (rows, inputs))
        stored = (count, rows, inputs)
        return Part(names[name].format(layer), (rows, inputs), first_row=expert * rows, stored=stored)

    for expert, ours in enumerate(spec.feed_forwards(layer)):
        gate, up = (part(name, ffn, hidden, expert) for name in ("expert_gate", "expert_up"))
        made.append(Recipe(ours + "gate_up", (gate, up), block=GROUP_SIZE))
        made.append(Recipe(ours + "down", (part("expert_down", hidden, ffn, expert),)))
    return made


def need_neutral(keys: Keys, neutral: Mapping[str, tuple[object, ...]], *read: str) -> None:
    """Raise for a key that would change the arithmetic, but for those that the family reads itself."""
    for key, allowed in neutral.items():
        if key not in read:
            keys.neutral(key, *allowed)


def need_float_causal_lm(keys: Keys) -> None:
    """Raise for a config.json of a model that writes no text, or whose weights are stored quantized."""
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


def _is_tied(keys: Keys, description: Description, *, default: bool) -> bool:
    """Whether the embedding is the head too. A head of its own counts even where the configuration denies it."""
    embed, head = HUGGINGFACE_NAMES["embed"], HUGGINGFACE_NAMES["head"]
    if not keys.flag("tie_word_embeddings", default=default):
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


def ignored_in_folder(spec: DecoderSpec, description: Description) -> frozenset[str]:
    """Frequencies that early checkpoints stored beside their weights, and a copy of the embedding as the head."""
    ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(spec.num_layers)}
    if spec.tie_embeddings:
        ignored.add(HUGGINGFACE_NAMES["head"])
    return frozenset(ignored & description.shapes.keys())


def _num_layers(keys: Keys, key: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Compared with the tensors there are before anything is made for each layer."""
    count = keys.count(key, least=1)
    needed = _TENSORS_PER_LAYER * count
    if needed > len(shapes):
        raise UnsupportedModelError(
            f"{keys.name(key)} is {count}, which takes {needed} tensors and more, but the checkpoint has {len(shapes)}."
        )
    return count


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
    size = keys.count("vocab_size", default=embed[0])
    if size != embed[0]:
        raise UnsupportedModelError(f"{keys.name('vocab_size')} is {size}, but {embedding} has {embed[0]} rows.")
    return size


def experts_from_gguf(keys: Keys) -> tuple[int, int]:
    """Experts of a layer, and those that a token goes to; 0 and 0 where there are none."""
    count = keys.count("expert_count", default=0)
    return count, keys.count("expert_used_count", least=1) if count else 0


def window_from_config(keys: Keys) -> int:
    """What config.json says of a window; 0: there is none."""
    return 0 if keys.get("sliding_window") is None else keys.count("sliding_window", least=1)


def windows(sizes: Sizes, window: int, slides: Callable[[int], bool] = lambda _: True) -> tuple[int, ...]:
    """Of each layer the positions that it attends: `window` where it slides, 0 for all. A window as long as the context
    hides nothing."""
    found = sliding(sizes, window, slides)
    return found if any(found) and window < sizes["max_position"] else ()


def sliding(sizes: Sizes, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The same of a family whose layers with a window differ from the others in more than that."""
    return tuple(window if slides(i) else 0 for i in range(sizes["num_layers"]))


def sliding_layers(keys: Keys, sizes: Sizes, default: Callable[[int], bool]) -> Callable[[int], bool]:
    """Which layers slide by config.json's `layer_types`, or by `default` where it has none."""
    kinds, layers = keys.get("layer_types"), sizes["num_layers"]
    if kinds is None:
        return default
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise keys.error("layer_types", f"{layers} times {' or '.join(known)}")
    return lambda layer: kinds[layer] == "sliding_attention"
