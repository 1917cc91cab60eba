"""Make the golden data of this folder with PyTorch and Hugging Face transformers; README.md says how and what.

Every number comes from transformers' LlamaForCausalLM in float32 on the CPU, with the weights that gguf's own
dequantization gives. Nothing of `engine` is imported: the reference must not share our mistakes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from tests.golden.checkpoints import CHECKPOINTS, weights_digest, write_checkpoint
from tests.golden.make_tokenizer_golden import load as load_tokenizer

HERE = Path(__file__).parent
WINDOW = 1024  # tokens that one perplexity window sees, each window from an empty context
TOP = 64
FULL_EVERY = 9  # one position in so many keeps all its logits
TINY_EVERY = 3  # of the tiny checkpoints; the last of 70 positions is one of them

PROMPTS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n",
    "The rivers of Europe carried grain, timber and salt long before there were roads that a cart could",
    "Zwölf Kisten, 1234 «naïve» 日本語 🙂 — 3.14159 ≈ π; e-mail: a.b@c.de\t(end)",
)


def load_llama(path: Path) -> LlamaForCausalLM:
    """The checkpoint in a GGUF file as transformers' own model, float32, eager attention."""
    reader = gguf.GGUFReader(path)

    def key(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    weights = {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    num_heads, num_kv_heads = int(key("attention.head_count")), int(key("attention.head_count_kv"))
    tied = "output.weight" not in weights
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(weights["token_embd.weight"]),
            hidden_size=int(key("embedding_length")),
            intermediate_size=int(key("feed_forward_length")),
            num_hidden_layers=int(key("block_count")),
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=int(key("rope.dimension_count")),  # all lanes of a head turn
            max_position_embeddings=int(key("context_length")),
            rms_norm_eps=float(key("attention.layer_norm_rms_epsilon")),
            rope_parameters={"rope_type": "default", "rope_theta": float(key("rope.freq_base"))},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    state = {
        "model.embed_tokens.weight": weights.pop("token_embd.weight"),
        "model.norm.weight": weights.pop("output_norm.weight"),
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if tied else weights.pop("output.weight")
    names = {
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
    for name, value in weights.items():
        _, layer, part, _ = name.split(".")  # blk.0.attn_q.weight
        if part in ("attn_q", "attn_k"):
            value = half_split(value, num_heads if part == "attn_q" else num_kv_heads)
        state[f"model.layers.{layer}.{names[part]}.weight"] = value
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF stores query and key rows for interleaved rope pairs; transformers turns lane i with lane i + dim / 2."""
    outputs, inputs = rows.shape
    return rows.reshape(heads, outputs // heads // 2, 2, inputs).transpose(1, 2).reshape(outputs, inputs)


def logits_of(model: LlamaForCausalLM, token_ids: list[int]) -> NDArray[np.float32]:
    """float32 [len(token_ids), vocab]."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([token_ids])).logits[0].numpy()
    return logits


def make_tiny() -> None:
    """For each of CHECKPOINTS, token ids of one sequence and its logits at every third position."""
    for name in CHECKPOINTS:
        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(Path(folder), name)
            digest = weights_digest(path)
            model = load_llama(path)
        token_ids = np.random.default_rng(70).integers(0, model.config.vocab_size, 70, dtype=np.int32)
        positions = np.arange(0, len(token_ids), TINY_EVERY, dtype=np.int32)
        logits = logits_of(model, token_ids.tolist())[positions]
        np.savez_compressed(
            HERE / f"tiny_{name}.npz", token_ids=token_ids, positions=positions, logits=logits, weights_digest=digest
        )
        print(f"{name}: {list(logits.shape)}, root mean square {np.sqrt(np.square(logits).mean()):.3f}")


def make_default(path: Path) -> None:
    """Logits of the default model over PROMPTS, and its likelihood of perplexity.txt."""
    model = load_llama(path)
    tokenizer = load_tokenizer(path)

    prompts = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    logits = np.concatenate([logits_of(model, ids) for ids in prompts])
    full = np.arange(0, len(logits), FULL_EVERY, dtype=np.int32)
    top = np.argsort(-logits, axis=1)[:, :TOP].astype(np.int32)
    np.savez_compressed(
        HERE / "default_logits.npz",
        token_ids=np.concatenate(prompts).astype(np.int32),
        prompt_lens=np.array([len(ids) for ids in prompts], np.int32),
        full_positions=full,
        full_logits=logits[full].astype(np.float16),
        top_ids=top,
        top_logits=np.take_along_axis(logits, top, axis=1),
        logsumexp=torch.logsumexp(torch.from_numpy(logits).double(), dim=1).numpy(),
    )
    print(f"{len(logits)} positions, {len(full)} of them in full")

    token_ids = tokenizer((HERE / "perplexity.txt").read_text(), add_special_tokens=False).input_ids
    sums, counts = [], []
    for begin in range(0, len(token_ids) - 1, WINDOW):
        window = token_ids[begin : begin + WINDOW]
        logprobs = torch.log_softmax(torch.from_numpy(logits_of(model, window)), dim=-1)
        sums.append(-logprobs[torch.arange(len(window) - 1), window[1:]].double().sum().item())
        counts.append(len(window) - 1)
        print(f"window {len(sums)}: perplexity {math.exp(sums[-1] / counts[-1]):.4f}", flush=True)
    np.savez_compressed(
        HERE / "default_perplexity.npz",
        token_ids=np.array(token_ids, np.uint16),
        window=np.int32(WINDOW),
        nll=np.array(sums) / np.array(counts),
        counts=np.array(counts, np.int32),
    )
    print(f"{len(token_ids)} tokens, perplexity {math.exp(sum(sums) / sum(counts)):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="make tiny_*.npz")
    parser.add_argument("--default", type=Path, metavar="GGUF", help="make default_*.npz from the default model's file")
    arguments = parser.parse_args()
    if arguments.tiny:
        make_tiny()
    if arguments.default:
        make_default(arguments.default)


if __name__ == "__main__":
    main()
