"""Tiny random checkpoints of every family, as Hugging Face folders and, with the same weights, as GGUF files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import GGUF_PARTS, TinyFolder, interleaved

Tensors = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Family:
    """What makes a Llama another family: keys of config.json, and what becomes of the tensors of a layer."""

    model_type: str
    architecture: str  # of transformers
    gguf: str  # general.architecture
    config: Mapping[str, object]  # None: the key is left out
    change: Callable[[Tensors, TinyFolder, np.random.Generator], Tensors]  # a Llama's tensors to the family's
    gguf_keys: Mapping[str, object] = field(default_factory=dict)  # without the architecture's prefix
    gguf_vectors: Mapping[str, object] = field(default_factory=dict)  # of the whole model, by name
    norm_plus: float = 0.0  # what GGUF stores norms with


def _plain(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    return tensors


def _with_biases(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    made = {}
    for name, values in tensors.items():
        made[name] = values
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = 0.5 * rng.standard_normal(len(values))
            made[name.replace(".weight", ".bias")] = bias.astype(np.float32)
    return made


def _with_head_norms(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    made = dict(tensors)
    head_dim = model.config["head_dim"]
    assert isinstance(head_dim, int)
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = 1 + 0.2 * rng.standard_normal(head_dim)
            made[name.replace("_proj", "_norm")] = weight.astype(np.float32)
    return made


def _as_gemma(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    """Norms around attention and feed-forward, all stored less one."""
    made = {}
    for name, values in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            for other in ("post_attention", "pre_feedforward", "post_feedforward"):
                weight = 1 + 0.1 * rng.standard_normal(len(values))
                made[name.replace("post_attention", other)] = weight.astype(np.float32)
        else:
            made[name] = values
    return {name: values - np.float32(values.ndim == 1) for name, values in made.items()}


def _as_gemma3(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    return _as_gemma(_with_head_norms(tensors, model, rng), model, rng)


def _fused(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    made: Tensors = {}
    for name, values in tensors.items():
        for part, whole in (("q_proj", "qkv_proj"), ("k_proj", "qkv_proj"), ("v_proj", "qkv_proj"),
                            ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj")):  # fmt: skip
            if f".{part}." in name:
                target = name.replace(part, whole)
                made[target] = np.concatenate([made[target], values]) if target in made else values
                break
        else:
            made[name] = values
    return made


def _with_experts(
    tensors: Tensors, model: TinyFolder, rng: np.random.Generator, *, count: int, width: int, names: Mapping[str, str]
) -> Tensors:
    """`count` experts, `width` wide, in place of each feed-forward; names of theirs by those of Llama's."""
    made: Tensors = {}
    for name, values in tensors.items():
        layer, found, part = name.partition(".mlp.")
        if not found:
            made[name] = values
            continue
        hidden = model.tensors["model.norm.weight"].size
        if part == "gate_proj.weight":
            router = rng.standard_normal((count, hidden)) / np.sqrt(hidden)
            made[f"{layer}.{names['router']}.weight"] = router.astype(np.float32)
        shape = (hidden, width) if part == "down_proj.weight" else (width, hidden)
        shared = rng.standard_normal(shape)
        for expert in range(count):  # alike, so that one that rounding chooses in place of another does not decide all
            weight = (shared + 0.2 * rng.standard_normal(shape)) / np.sqrt(1.04 * shape[1])
            made[f"{layer}.{names[part.removesuffix('.weight')].format(expert)}.weight"] = weight.astype(np.float32)
    return made


def _as_mixtral(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    names = {"router": "block_sparse_moe.gate"} | {
        part: f"block_sparse_moe.experts.{{}}.{short}"
        for part, short in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    }
    width = model.config["intermediate_size"]
    assert isinstance(width, int)
    return _with_experts(tensors, model, rng, count=4, width=width, names=names)


def _as_qwen3_moe(tensors: Tensors, model: TinyFolder, rng: np.random.Generator) -> Tensors:
    names = {part: f"mlp.experts.{{}}.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    normed = _with_head_norms(tensors, model, rng)
    return _with_experts(normed, model, rng, count=6, width=64, names={**names, "router": "mlp.gate"})


_SHORT, _LONG = [1.0, 1.0, 1.1, 1.2, 1.5, 2.0], [1.0, 1.3, 2.0, 4.0, 8.0, 16.0]

FAMILIES: Mapping[str, Family] = {
    "mistral": Family(
        "mistral",
        "MistralForCausalLM",
        "llama",
        {"sliding_window": 20, "attention_bias": None, "mlp_bias": None},
        _plain,
        {"attention.sliding_window": 20},
    ),
    # All layers but the first slide; positions stretched by YaRN.
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        {
            "attention_bias": None,
            "mlp_bias": None,
            "rope_parameters": None,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        _with_biases,
        {
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "qwen3", {"mlp_bias": None}, _with_head_norms),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        "llama",
        {"attention_bias": None, "mlp_bias": None, "num_local_experts": 4, "num_experts_per_tok": 2},
        _as_mixtral,
        {"expert_count": 4, "expert_used_count": 2},
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "qwen3moe",
        {
            "mlp_bias": None,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
        _as_qwen3_moe,
        {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 64},
    ),
    # Every other layer slides. Caps so low that they bend what they bound.
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        {
            "mlp_bias": None,
            "hidden_act": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 48,
            "sliding_window": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        _as_gemma,
        {"attention.sliding_window": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        norm_plus=1.0,
    ),
    # Five layers of six slide, and turn by a base of their own.
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        {
            "mlp_bias": None,
            "hidden_act": None,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 32,
            "sliding_window": 20,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        _as_gemma3,
        {
            "attention.sliding_window": 20,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        norm_plus=1.0,
    ),
    # Three quarters of 16 lanes turn, by the factors of contexts that are longer than the first training's.
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        {
            "attention_bias": None,
            "mlp_bias": None,
            "head_dim": None,
            "pad_token_id": 0,  # within this vocabulary, which transformers' own is not
            "sliding_window": 40,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_parameters": None,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
        },
        _fused,
        {
            "attention.sliding_window": 40,
            "rope.dimension_count": 12,
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(512 / 64) / math.log(64)),
        },
        {"rope_factors_short.weight": _SHORT, "rope_factors_long.weight": _LONG},
    ),
}

_GGUF_PARTS: Mapping[str, str] = {
    **GGUF_PARTS,
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_up_proj": "ffn_up",
}

_EXPERT_PARTS: Mapping[str, str] = {
    **dict.fromkeys(("w1", "gate_proj"), "ffn_gate_exps"),
    **dict.fromkeys(("w3", "up_proj"), "ffn_up_exps"),
    **dict.fromkeys(("w2", "down_proj"), "ffn_down_exps"),
}

_GEMMA_PARTS: Mapping[str, str] = {
    **_GGUF_PARTS,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tiny_folder(name: str, *, seed: int = 0, **sizes: object) -> TinyFolder:
    """FAMILIES[name] in small; `sizes` are arguments of TinyFolder."""
    family = FAMILIES[name]
    model = TinyFolder(seed=seed, **sizes)  # type: ignore[arg-type]  # passed on as they are
    tensors = family.change(model.tensors, model, np.random.default_rng((seed, 1)))
    dtype = next(iter(model.types.values()))
    model.tensors, model.types = tensors, dict.fromkeys(tensors, dtype)
    model.config |= {"model_type": family.model_type, "architectures": [family.architecture], **family.config}
    model.config = {key: value for key, value in model.config.items() if value is not None}
    return model


def tiny_gguf(name: str, folder: TinyFolder, quant: str, *, head_dim: int) -> TinyLlama:
    """The model of a folder that `tiny_folder` made as a GGUF file, its matrices stored as `quant`."""
    family = FAMILIES[name]
    sizes = {key: value for key, value in folder.config.items() if isinstance(value, int)}
    model = TinyLlama(
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=head_dim,
        ffn=sizes["intermediate_size"],
        vocab=sizes["vocab_size"],
        quant=quant,
        context=sizes["max_position_embeddings"],
    )
    metadata = {key.replace("llama.", f"{family.gguf}.", 1): value for key, value in model.metadata.items()}
    metadata |= {f"{family.gguf}.{key}": value for key, value in family.gguf_keys.items()}
    model.metadata = {**metadata, "general.architecture": family.gguf}
    parts = _GEMMA_PARTS if family.norm_plus else _GGUF_PARTS
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        **{
            f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}"
            for i in range(sizes["num_hidden_layers"])
            for theirs, ours in parts.items()
        },
    }
    model.tensors = {}
    experts: dict[str, list[NDArray[np.float32]]] = {}
    for theirs, values in folder.tensors.items():
        if ".experts." in theirs:
            _, _, layer, *_, short, _ = theirs.split(".")
            experts.setdefault(f"blk.{layer}.{_EXPERT_PARTS[short]}.weight", []).append(values)
            continue
        stem, _, kind = theirs.rpartition(".")
        stored = values + np.float32(family.norm_plus) if values.ndim == 1 else values
        if family.gguf == "llama" and (".q_proj" in theirs or ".k_proj" in theirs):
            stored = interleaved(values, head_dim)
        model.tensors[f"{names[stem]}.{kind}"] = stored
    for name_of_all, each in experts.items():
        model.tensors[name_of_all] = np.stack(each)
    for vector, numbers in family.gguf_vectors.items():
        model.tensors[vector] = np.array(numbers, np.float32)
    model.types = {key: _type_of(key, values, quant) for key, values in model.tensors.items()}
    return model


def _type_of(name: str, values: NDArray[np.float32], quant: str) -> str:
    if values.ndim == 1 or "ffn_gate_inp" in name:
        return "F32"
    return "Q8_0" if quant.endswith("_K") and values.shape[-1] % 256 else quant  # as real files do
