"""What a decoder IS, as data. Kernels and weights know only this, never a family's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModelError

GROUP_SIZE = 32
"""Inputs per quantization group; every projection's input size is a multiple of it."""

LANES = 16
"""Vector width that head sizes are multiples of."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding in the half-split convention: lane i turns with lane i + dim / 2.

    Checkpoints whose rows are stored for interleaved pairs are reordered when they are packed.
    """

    theta: float
    dim: int  # rotated lanes of each head, from lane 0
    factors: tuple[float, ...] = ()  # [dim / 2] what each pair's frequency is divided by (rope scaling); empty: by 1

    def frequencies(self) -> NDArray[np.float64]:
        """Radians per position of each pair of lanes, float64 [dim / 2]."""
        frequencies = self.theta ** (-2.0 * np.arange(self.dim // 2) / self.dim)
        return frequencies / np.asarray(self.factors) if self.factors else frequencies


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer: pre-norm, grouped-query attention, gated feed-forward.

    Tensors, by name (see `tensor_shapes`); shapes are [outputs, inputs]. `layers.N.qkv` is query, key and value
    rows one after another; `layers.N.gate_up` alternates 32 gate rows and the 32 up rows of the same columns,
    so that one tile holds what the gated activation multiplies.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position: int
    norm_eps: float
    rope: RopeSpec
    activation: str = "silu"
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        def need(ok: bool, what: str, expected: str, got: object) -> None:
            if not ok:
                raise UnsupportedModelError(f"{self.family}: {what} must be {expected}, the checkpoint has {got}.")

        for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            need(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        need(self.vocab_size >= 2, "vocab_size", "at least 2", self.vocab_size)
        need(self.max_position >= 1, "max_position", "at least 1", self.max_position)
        need(self.hidden_size % GROUP_SIZE == 0, "hidden_size", f"a multiple of {GROUP_SIZE}", self.hidden_size)
        need(
            self.intermediate_size % GROUP_SIZE == 0,
            "intermediate_size",
            f"a multiple of {GROUP_SIZE}",
            self.intermediate_size,
        )
        need(self.head_dim % LANES == 0, "head_dim", f"a multiple of {LANES}", self.head_dim)
        need(
            (self.num_heads * self.head_dim) % GROUP_SIZE == 0,
            "num_heads * head_dim",
            f"a multiple of {GROUP_SIZE}",
            self.num_heads * self.head_dim,
        )
        need(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"a multiple of num_kv_heads {self.num_kv_heads}",
            self.num_heads,
        )
        need(self.rope.dim == self.head_dim, "rope.dim", f"head_dim {self.head_dim}", self.rope.dim)
        if self.rope.factors:
            num_pairs = self.rope.dim // 2
            need(len(self.rope.factors) == num_pairs, "rope.factors", f"{num_pairs} values", len(self.rope.factors))
            usable = all(0 < factor < float("inf") for factor in self.rope.factors)
            need(usable, "rope.factors", "positive and finite", self.rope.factors)
        need(self.activation == "silu", "activation", "silu", self.activation)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a packed checkpoint of this spec holds. One-dimensional ones are float32, the rest packed."""
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_layers):
            shapes[f"layers.{i}.attn_norm"] = (self.hidden_size,)
            shapes[f"layers.{i}.qkv"] = (self.q_size + 2 * self.kv_size, self.hidden_size)
            shapes[f"layers.{i}.o"] = (self.hidden_size, self.q_size)
            shapes[f"layers.{i}.ffn_norm"] = (self.hidden_size,)
            shapes[f"layers.{i}.gate_up"] = (2 * self.intermediate_size, self.hidden_size)
            shapes[f"layers.{i}.down"] = (self.hidden_size, self.intermediate_size)
        shapes["final_norm"] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def kv_bytes_per_token(self, kv_dtype: str = "bf16") -> int:
        """Bytes of keys and values that one token of context holds, over all layers."""
        per_head = self.head_dim + 4 if kv_dtype == "int8" else 2 * self.head_dim  # quants and their float32 scale
        return self.num_layers * 2 * self.num_kv_heads * per_head


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What text and serving need to know of a checkpoint beside its decoder."""

    spec: DecoderSpec
    tokenizer_json: str  # serialized `tokenizers.Tokenizer`
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # every token that ends a turn or the text
    add_bos: bool  # the tokenizer puts BOS before plain text
    special_token_ids: tuple[int, ...] = field(default=())
    checkpoint_format: str = ""  # what the checkpoint stored, as "Q4_1 GGUF" or "BF16 safetensors"
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    """How the checkpoint wants to be sampled, by the API's names: temperature, top_k, top_p, min_p,
    repetition_penalty, max_tokens. Only what it says."""
