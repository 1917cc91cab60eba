"""The tiny random Hugging Face folders that have golden logits: made from a seed wherever they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.tiny_families import tiny_folder
from tests.tiny_hf import TinyFolder, encode


@dataclass(frozen=True, slots=True)
class Form:
    """One published family in small: sizes and keys of `TinyFolder`, and how the weights are stored."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    tie: bool
    dtype: str
    shards: int
    config: Mapping[str, object] = field(default_factory=dict)  # None: the key is left out
    layers: int = 2
    family: str = ""  # of tests.tiny_families; none: a Llama

    def model(self, seed: int) -> TinyFolder:
        make = partial(tiny_folder, self.family) if self.family else TinyFolder
        made = make(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn=self.ffn,
            dtype=self.dtype,
            seed=seed,
            tie=self.tie,
        )
        made.config |= self.config
        made.config = {key: value for key, value in made.config.items() if value is not None}
        return made


FOLDERS: Mapping[str, Form] = {
    # Many heads without sharing, positions interpolated; keys as they were before `rope_parameters`.
    "llama2": Form(64, 4, 4, 16, 160, False, "F16", 3, {
        "rope_parameters": None, "head_dim": None, "num_key_value_heads": None,
        "rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 2048,
    }),
    # An original context of 32, so that within 70 tokens all three kinds of frequencies matter.
    "llama3": Form(128, 4, 2, 32, 96, False, "BF16", 1, {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    }),
    # Heads that are wider than their share of the hidden size, and a window that hides nothing of 70 tokens.
    "mistral": Form(96, 4, 1, 32, 224, False, "F32", 1, {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "attention_bias": None, "mlp_bias": None,
    }),
    "smollm2": Form(576, 9, 3, 64, 96, True, "BF16", 2, {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    }),
    "tinyllama": Form(128, 8, 2, 16, 352, False, "F16", 1, {
        "rope_parameters": None, "head_dim": None, "rope_theta": 10000.0, "rope_scaling": None,
    }),
    "mistral_sliding": Form(96, 4, 1, 32, 224, False, "BF16", 1, family="mistral"),
    "qwen2": Form(128, 4, 2, 32, 96, True, "BF16", 1, family="qwen2"),
    # All layers but the first slide.
    "qwen3": Form(96, 4, 2, 32, 160, False, "BF16", 1, {
        "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1,
    }, layers=3, family="qwen3"),
    "mixtral": Form(96, 4, 2, 32, 64, False, "BF16", 1, family="mixtral"),
    "qwen3_moe": Form(64, 4, 2, 16, 96, True, "BF16", 1, family="qwen3_moe"),
    "gemma2": Form(96, 4, 2, 48, 160, True, "BF16", 1, family="gemma2"),
    "gemma3": Form(64, 4, 1, 32, 96, True, "BF16", 1, layers=7, family="gemma3"),
    # A context within the first training's, so that the short factors turn; and one beyond it, the long ones.
    "phi3": Form(64, 4, 2, 16, 96, False, "BF16", 1, {
        "max_position_embeddings": 96, "original_max_position_embeddings": 96,
    }, family="phi3"),
    "phi3_long": Form(64, 4, 4, 16, 128, True, "BF16", 1, family="phi3"),
}  # fmt: skip


def write_folder(folder: Path, name: str) -> Path:
    """Write FOLDERS[name] into `folder`/`name` and return it."""
    form = FOLDERS[name]
    return form.model(_seed(name)).write(folder / name, shards=form.shards)


def stored_digest(name: str) -> str:
    """SHA-256 over the stored bytes of FOLDERS[name]: whether golden logits belong to these weights."""
    model = FOLDERS[name].model(_seed(name))
    digest = hashlib.sha256()
    for tensor, values in sorted(model.tensors.items()):
        digest.update(f"{tensor} {model.types[tensor]} {list(values.shape)}\n".encode())
        digest.update(encode(values, model.types[tensor]).tobytes())
    return digest.hexdigest()


def _seed(name: str) -> int:
    return 10 + list(FOLDERS).index(name)
