"""The tiny random checkpoints that have golden logits: made from a seed wherever they are needed, never stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gguf

from tests.tiny_gguf import TinyLlama


@dataclass(frozen=True, slots=True)
class Shape:
    """Arguments of TinyLlama. The sizes are awkward on purpose: few are multiples of a vector or a strip."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    quant: str
    tie: bool
    seed: int
    mix: Mapping[str, str] = field(default_factory=dict)


CHECKPOINTS = {
    "f32_gqa_tied": Shape(64, 3, 4, 2, 16, 96, 307, "F32", True, 5),
    "f16_one_kv_head_untied": Shape(96, 2, 6, 1, 48, 64, 333, "F16", False, 6),
    "bf16_hidden_576_tied": Shape(576, 2, 9, 3, 64, 224, 301, "BF16", True, 7),
    "q4_0_gqa_tied": Shape(64, 3, 4, 2, 16, 96, 307, "Q4_0", True, 1),
    "q4_1_mha_untied": Shape(96, 2, 3, 3, 32, 160, 277, "Q4_1", False, 2),
    "q4_1_one_kv_head_untied": Shape(96, 2, 6, 1, 48, 64, 333, "Q4_1", False, 4),
    "q5_0_mha_tied": Shape(96, 3, 2, 2, 48, 96, 291, "Q5_0", True, 8),
    "q5_1_one_kv_head_untied": Shape(96, 2, 6, 1, 48, 64, 333, "Q5_1", False, 9),
    "q8_0_gqa_tied": Shape(576, 2, 9, 3, 64, 224, 301, "Q8_0", True, 3),
    "q4_k_gqa_tied": Shape(256, 3, 8, 2, 32, 512, 277, "Q4_K", True, 10),
    "q5_k_one_kv_head_untied": Shape(512, 2, 4, 1, 64, 256, 307, "Q5_K", False, 11),
    "q6_k_mha_untied": Shape(256, 2, 16, 16, 16, 256, 291, "Q6_K", False, 12),
    # As real files mix types: more bits for the vocabulary and for what is sensitive, other types where rows of
    # K-quants, whose blocks are 256 wide, do not fit.
    "mixed_q4_k_m_gqa_tied": Shape(
        256,
        3,
        4,
        2,
        64,
        256,
        301,
        "Q4_K",
        True,
        13,
        {"token_embd.*": "Q6_K", "blk.0.attn_v.*": "Q6_K", "blk.0.ffn_down.*": "Q6_K"},
    ),
    "mixed_q4_k_m_hidden_576_tied": Shape(
        576,
        2,
        9,
        3,
        64,
        224,
        307,
        "Q5_0",
        True,
        14,
        {"token_embd.*": "Q8_0", "blk.1.attn_v.*": "Q8_0", "blk.1.ffn_down.*": "Q8_0"},
    ),
    "mixed_q4_0_f16_embed_untied": Shape(
        96,
        2,
        3,
        1,
        32,
        160,
        301,
        "Q4_0",
        False,
        15,
        {"token_embd.*": "F16", "output.weight": "Q8_0", "blk.0.attn_v.*": "Q4_1"},
    ),
}


def write_checkpoint(folder: Path, name: str) -> Path:
    """Write the GGUF file of CHECKPOINTS[name] into `folder` and return its path."""
    return TinyLlama(**asdict(CHECKPOINTS[name])).write(folder / f"{name}.gguf")


def weights_digest(path: Path) -> str:
    """SHA-256 over the stored bytes of a GGUF file's tensors: whether golden logits belong to these weights."""
    digest = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda t: t.name):
        digest.update(f"{tensor.name} {tensor.tensor_type.name} {tensor.shape.tolist()}\n".encode())
        digest.update(tensor.data.tobytes())
    return digest.hexdigest()
