"""Tiny random Llama checkpoints as GGUF files, with a working tokenizer and a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from tests import k_quants

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 307
"""Three special tokens, 256 bytes, 48 merges; a multiple of no vector width."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TinyLlama:
    """A checkpoint in memory; a test changes `metadata` and `tensors` as it likes before `write`.

    `metadata` maps keys to int (stored as uint32), float, bool, str or lists. `tensors` maps names to float32 arrays of
    shape (outputs, inputs) or (length,), `types` to the type each is stored in: F32 for vectors, `quant` for matrices,
    or the value of `mix` whose key is a pattern of their name ("blk.0.attn_v.*"). Query and key rows are stored as GGUF
    stores them, in the order of interleaved rope.
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
        quant: str = "Q4_1",
        mix: Mapping[str, str] = MappingProxyType({}),
        seed: int = 0,
        tie: bool = True,
        context: int = 512,
    ) -> None:
        self.metadata: dict[str, object] = {
            "general.architecture": "llama",
            "general.name": "tiny",
            "llama.block_count": layers,
            "llama.context_length": context,
            "llama.embedding_length": hidden,
            "llama.feed_forward_length": ffn,
            "llama.attention.head_count": heads,
            "llama.attention.head_count_kv": kv_heads,
            "llama.attention.key_length": head_dim,
            "llama.attention.value_length": head_dim,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": head_dim,
            "llama.rope.freq_base": 10000.0,
            "llama.vocab_size": vocab,
            **_tokenizer_metadata(vocab),
        }
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden)}
        for i in range(layers):
            shapes |= {
                f"blk.{i}.attn_norm.weight": (hidden,),
                f"blk.{i}.attn_q.weight": (heads * head_dim, hidden),
                f"blk.{i}.attn_k.weight": (kv_heads * head_dim, hidden),
                f"blk.{i}.attn_v.weight": (kv_heads * head_dim, hidden),
                f"blk.{i}.attn_output.weight": (hidden, heads * head_dim),
                f"blk.{i}.ffn_norm.weight": (hidden,),
                f"blk.{i}.ffn_gate.weight": (ffn, hidden),
                f"blk.{i}.ffn_up.weight": (ffn, hidden),
                f"blk.{i}.ffn_down.weight": (hidden, ffn),
            }
        shapes["output_norm.weight"] = (hidden,)
        if not tie:
            shapes["output.weight"] = (vocab, hidden)
        rng = np.random.default_rng(seed)
        self.tensors = {name: _random(rng, shape) for name, shape in shapes.items()}
        self.types = {name: "F32" if len(shape) == 1 else quant for name, shape in shapes.items()}
        for pattern, kind in mix.items():
            self.types |= {name: kind for name in shapes if len(shapes[name]) == 2 and fnmatchcase(name, pattern)}

    def write(self, path: Path) -> Path:
        """Write the checkpoint to `path` and return it."""
        writer = gguf.GGUFWriter(path, str(self.metadata["general.architecture"]))
        for key, value in self.metadata.items():
            if key != "general.architecture":  # the writer's own
                _add(writer, key, value)
        for name, values in self.tensors.items():
            kind = gguf.GGMLQuantizationType[self.types[name]]
            writer.add_tensor(name, stored_as(values, self.types[name]), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def stored_as(values: NDArray[np.float32], kind: str) -> NDArray[np.float32] | NDArray[np.uint8]:
    """Values as a GGUF file stores them: float32 as they are, rows of raw bytes for any other type."""
    if kind == "F32":
        return values
    if kind in ("Q4_K", "Q5_K", "Q6_K"):
        rows = k_quants.quantize(values.reshape(-1, values.shape[-1]), kind)
        return rows.reshape(*values.shape[:-1], -1)
    raw: NDArray[np.uint8] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    return raw


def write_tiny_llama(
    path: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = VOCAB,
    quant: str = "Q4_1",
    seed: int = 0,
    tie: bool = True,
    context: int = 512,
) -> None:
    """Write a tiny random Llama: weights of type `quant`, a byte-level BPE tokenizer, a ChatML template."""
    TinyLlama(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        quant=quant,
        seed=seed,
        tie=tie,
        context=context,
    ).write(path)


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Norm weights near one; matrices that keep the size of what goes through them."""
    values = rng.standard_normal(shape)
    return (1 + 0.1 * values if len(shape) == 1 else values / np.sqrt(shape[-1])).astype(np.float32)


def _tokenizer_metadata(vocab: int) -> Mapping[str, object]:
    tokens = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    if vocab <= len(tokens):  # an empty list of merges would not be stored
        raise ValueError(f"vocab must be at least {len(tokens) + 1}, got {vocab}")
    # Pairs of frequent letters, after a space too, so that text is really merged.
    pairs = [(first, second) for first in "Ġtheaoinsr" for second in "theaoinsr"]
    merges = pairs[: vocab - len(tokens)]
    tokens += [first + second for first, second in merges]
    types = [gguf.TokenType.CONTROL] * len(SPECIAL_TOKENS)
    types += [gguf.TokenType.NORMAL] * (len(tokens) - len(types))
    padding = vocab - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(padding)],
        "tokenizer.ggml.token_type": [int(kind) for kind in types] + [int(gguf.TokenType.UNUSED)] * padding,
        "tokenizer.ggml.merges": [f"{first} {second}" for first, second in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}: {value!r}")
