"""The tiny random checkpoints that have golden logits: made from a seed wherever they are needed, never stored."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
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


CHECKPOINTS = {
    "q4_0_gqa_tied": Shape(64, 3, 4, 2, 16, 96, 307, "Q4_0", True, 1),
    "q4_1_mha_untied": Shape(96, 2, 3, 3, 32, 160, 277, "Q4_1", False, 2),
    "q8_0_gqa_tied": Shape(576, 2, 9, 3, 64, 224, 301, "Q8_0", True, 3),
    "q4_1_one_kv_head_untied": Shape(96, 2, 6, 1, 48, 64, 333, "Q4_1", False, 4),
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
