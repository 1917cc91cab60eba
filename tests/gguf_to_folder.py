"""A Llama checkpoint from a GGUF file as the Hugging Face folder that it might have been made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.tiny_hf import write_safetensors

_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_folder(path: Path, folder: Path, *, tokenizer_json: str, dtype: str = "BF16") -> Path:
    """Write the checkpoint in `path` into `folder` and return it: its weights by gguf's own dequantization, stored as
    `dtype`, one shard for each layer; `tokenizer_json` as its tokenizer."""
    reader = gguf.GGUFReader(path)

    def number(name: str) -> float:
        value: float = reader.fields[f"llama.{name}"].contents()
        return value

    heads = {"attn_q": int(number("attention.head_count")), "attn_k": int(number("attention.head_count_kv"))}
    shards: dict[str, dict[str, tuple[str, NDArray[np.float32]]]] = {}
    for tensor in reader.tensors:
        values: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        match tensor.name.split("."):
            case ["blk", layer, part, "weight"]:
                shard, name = f"layer-{layer}", f"model.layers.{layer}.{_NAMES[part]}.weight"
                if part in heads:  # lane 2i + j of a head becomes lane (half j, i)
                    pairs = values.reshape(heads[part], -1, 2, values.shape[1])
                    values = pairs.transpose(0, 2, 1, 3).reshape(values.shape)
            case ["token_embd", "weight"]:
                shard, name = "outer", "model.embed_tokens.weight"
            case ["output_norm", "weight"]:
                shard, name = "outer", "model.norm.weight"
            case ["output", "weight"]:
                shard, name = "outer", "lm_head.weight"
            case _:
                raise ValueError(f"unexpected tensor {tensor.name}")
        shards.setdefault(f"{shard}.safetensors", {})[name] = (dtype, values)

    folder.mkdir(parents=True)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        write_safetensors(folder / shard, tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(number("embedding_length")),
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": int(number("rope.dimension_count")),  # all lanes of a head turn
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "tie_word_embeddings": "lm_head.weight" not in weight_map,
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "bos_token_id": int(reader.fields["tokenizer.ggml.bos_token_id"].contents()),
        "eos_token_id": int(reader.fields["tokenizer.ggml.eos_token_id"].contents()),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text(tokenizer_json)
    return folder
