"""Make greedy_*.npz with Hugging Face transformers; README.md says how and what.

Every number comes from transformers' own model in float32 on the CPU, with the weights that gguf's own dequantization
gives. Nothing of `engine` is imported: the reference must not share our mistakes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from tests.golden.make_golden import load_llama
from tests.golden.texts import BEGINNINGS

HERE = Path(__file__).parent
NUM_TOKENS = 24
TOP = 8

_GEMMA_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def load_gemma(path: Path) -> Gemma3ForCausalLM:
    """The checkpoint in a GGUF file as transformers' own model, float32, eager attention."""
    reader = gguf.GGUFReader(path)

    def key(name: str) -> Any:
        return reader.fields[f"gemma3.{name}"].contents()

    weights = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    bases = {"full_attention": float(key("rope.freq_base")), "sliding_attention": 10000.0}
    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(weights["token_embd.weight"]),
            hidden_size=int(key("embedding_length")),
            intermediate_size=int(key("feed_forward_length")),
            num_hidden_layers=int(key("block_count")),
            num_attention_heads=int(key("attention.head_count")),
            num_key_value_heads=int(key("attention.head_count_kv")),
            head_dim=int(key("attention.key_length")),
            query_pre_attn_scalar=int(key("attention.key_length")),
            max_position_embeddings=int(key("context_length")),
            sliding_window=int(key("attention.sliding_window")),
            rms_norm_eps=float(key("attention.layer_norm_rms_epsilon")),
            rope_parameters={kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()},
            attn_implementation="eager",
        )
    )
    embed = weights.pop("token_embd.weight")
    state = {"model.embed_tokens.weight": embed, "lm_head.weight": embed}
    state["model.norm.weight"] = weights.pop("output_norm.weight") - 1  # GGUF stores what it multiplies by
    for name, value in weights.items():
        _, layer, part, _ = name.split(".")  # blk.0.attn_q.weight
        state[f"model.layers.{layer}.{_GEMMA_NAMES[part]}.weight"] = value - 1 if value.ndim == 1 else value
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def make(name: str, model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
    """What the model goes on with, greedily, and the largest logits of each choice."""
    tokens, top_ids, top_logits = [], [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        past = None
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                out = model(ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
                past = out.past_key_values
                top = torch.topk(out.logits[0, -1], TOP)
                ids = torch.cat([ids, top.indices[None, :1]], dim=1)
                top_ids.append(top.indices.numpy())
                top_logits.append(top.values.numpy())
        tokens.append(ids[0, len(prompt) :].numpy())
    shape = (len(prompts), NUM_TOKENS, TOP)
    np.savez_compressed(
        HERE / f"greedy_{name}.npz",
        prompts=np.concatenate(prompts).astype(np.int32),
        prompt_lens=np.array([len(prompt) for prompt in prompts], np.int32),
        tokens=np.array(tokens, np.int32),
        top_ids=np.array(top_ids, np.int32).reshape(shape),
        top_logits=np.array(top_logits, np.float32).reshape(shape),
    )
    gaps: NDArray[np.float32] = np.array(top_logits)[:, 0] - np.array(top_logits)[:, 1]
    print(f"{name}: {len(prompts)} prompts, gaps {np.quantile(gaps, [0, 0.05, 0.5]).round(4).tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="the default model's file")
    parser.add_argument("--gemma3", type=Path, metavar="GGUF", help="gemma3-270m's file")
    arguments = parser.parse_args()
    for name, path, load in (("smollm2", arguments.smollm2, load_llama), ("gemma3", arguments.gemma3, load_gemma)):
        if path is not None:
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            bos = [tokenizer.bos_token_id] if name == "gemma3" else []
            prompts = [bos + tokenizer(text, add_special_tokens=False).input_ids for text in BEGINNINGS]
            make(name, load(path), prompts)


if __name__ == "__main__":
    main()
