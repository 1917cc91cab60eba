"""Tiny random Llama checkpoints as Hugging Face folders, with a working tokenizer and a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.tiny_gguf import CHAT_TEMPLATE, SPECIAL_TOKENS, VOCAB, TinyLlama

GGUF_PARTS: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class TinyFolder:
    """A checkpoint in memory; a test changes `config`, `tensors`, `types` and `generation` as it likes before `write`.

    `config` is config.json as transformers 5 writes it. `tensors` maps names to float32 arrays of shape (outputs,
    inputs) or (length,), `types` to the type each is stored in: F32, F16, BF16, or any other with the bytes as they
    are. `generation` is generation_config.json. The weights are drawn from `seed`, near what keeps activations in
    their size.
    """

    def __init__(
        self,
        *,
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        ffn: int = 96,
        vocab: int = VOCAB,
        dtype: str = "BF16",
        seed: int = 0,
        tie: bool = True,
        context: int = 512,
        config: Mapping[str, object] | None = None,
    ) -> None:
        self.config: dict[str, object] = {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "max_position_embeddings": context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "tie_word_embeddings": tie,
            "vocab_size": vocab,
            **(config or {}),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
        for i in range(layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "input_layernorm.weight": (hidden,),
                layer + "self_attn.q_proj.weight": (heads * head_dim, hidden),
                layer + "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
                layer + "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
                layer + "self_attn.o_proj.weight": (hidden, heads * head_dim),
                layer + "post_attention_layernorm.weight": (hidden,),
                layer + "mlp.gate_proj.weight": (ffn, hidden),
                layer + "mlp.up_proj.weight": (ffn, hidden),
                layer + "mlp.down_proj.weight": (hidden, ffn),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not tie:
            shapes["lm_head.weight"] = (vocab, hidden)
        rng = np.random.default_rng(seed)
        self.tensors = {name: _random(rng, shape) for name, shape in shapes.items()}
        self.types = dict.fromkeys(shapes, dtype)
        self.generation: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2}

    def write(self, folder: Path, *, shards: int = 1) -> Path:
        """Write the checkpoint into `folder` and return it; with several `shards`, tensor i goes into shard i % n."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "generation_config.json").write_text(json.dumps(self.generation))
        (folder / "tokenizer.json").write_text(tokenizer_json(self.tensors["model.embed_tokens.weight"].shape[0]))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[2]})
        )
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        names = list(self.tensors)
        if shards == 1:
            self.write_weights(folder / "model.safetensors", names)
            return folder
        weight_map: dict[str, str] = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            self.write_weights(folder / file, names[i::shards])
            weight_map |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    def write_weights(self, path: Path, names: list[str]) -> None:
        """The tensors `names` as one safetensors file."""
        write_safetensors(path, {name: (self.types[name], self.tensors[name]) for name in names})

    def as_gguf(self, quant: str) -> TinyLlama:
        """The same model in the other format, its matrices stored as `quant`, its vectors as float32."""
        sizes = {key: value for key, value in self.config.items() if isinstance(value, int)}
        heads, kv_heads, layers = (sizes[f"num_{n}"] for n in ("attention_heads", "key_value_heads", "hidden_layers"))
        model = TinyLlama(
            hidden=sizes["hidden_size"],
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=sizes["head_dim"],
            ffn=sizes["intermediate_size"],
            vocab=sizes["vocab_size"],
            quant=quant,
            tie="lm_head.weight" not in self.tensors,
            context=sizes["max_position_embeddings"],
        )
        names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        names["lm_head.weight"] = "output.weight"
        for i in range(layers):
            for theirs, ours in GGUF_PARTS.items():
                names[f"model.layers.{i}.{theirs}.weight"] = f"blk.{i}.{ours}.weight"
        for name, values in self.tensors.items():
            turned = "q_proj" in name or "k_proj" in name
            model.tensors[names[name]] = interleaved(values, sizes["head_dim"]) if turned else values
        return model


def interleaved(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Query or key rows as GGUF's llama stores them: lane (half j, i) of a head becomes lane 2i + j."""
    split = values.reshape(len(values) // head_dim, 2, -1, values.shape[1])
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3).reshape(values.shape))


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[np.generic]]]) -> None:
    """Write tensors, (type, values) by name; values of F16 and BF16 are rounded to the nearest, ties to even."""
    stored = {name: encode(values, kind) for name, (kind, values) in tensors.items()}  # alive while they are written
    specs = {
        name: TensorSpec(
            dtype=_LIBRARY_TYPES[kind], shape=values.shape, data_ptr=stored[name].ctypes.data,
            data_len=stored[name].nbytes,
        )
        for name, (kind, values) in tensors.items()
    }  # fmt: skip
    serialize_file(specs, path, metadata={"format": "pt"})


def encode(values: NDArray[np.generic], kind: str) -> NDArray[np.generic]:
    """Values as `kind` stores them; types other than F32, F16 and BF16 take the array's bytes as they are."""
    match kind:
        case "F32":
            return np.ascontiguousarray(values, "<f4")
        case "F16":
            return np.ascontiguousarray(values, "<f2")
        case "BF16":
            bits: NDArray[np.uint32] = np.ascontiguousarray(values, "<f4").view("<u4")
            return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.ascontiguousarray(values)


_LIBRARY_TYPES: Mapping[str, str] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
}


def tokenizer_json(vocab: int) -> str:
    """The byte-level tokenizer of `tests.tiny_gguf`, as the file that a folder has."""
    metadata = TinyLlama(vocab=vocab).metadata
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer.to_str()


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Norm weights near one; matrices that keep the size of what goes through them."""
    values = rng.standard_normal(shape)
    return (1 + 0.1 * values if len(shape) == 1 else values / np.sqrt(shape[-1])).astype(np.float32)
