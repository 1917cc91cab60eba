"""What a model IS, as data. Kernels and weights know only this, never a family's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModelError

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Spec = TypeVar("Spec", bound="DecoderSpec | EncoderSpec", default="DecoderSpec")
else:
    from typing import TypeVar

    Spec = TypeVar("Spec")

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
    long_factors: tuple[float, ...] = ()  # the same where more than `original_context` positions are served
    original_context: int = 0  # positions that the model was first trained for, beside long_factors
    attention_factor: float = 1.0  # what cos and sin are multiplied by

    def frequencies(self, context: int = 0) -> NDArray[np.float64]:
        """Radians per position of each pair of lanes where `context` positions are served, float64 [dim / 2].

        One set for a whole context: keys that were turned one way could not be compared with those of another.
        """
        frequencies = self.theta ** (-2.0 * np.arange(self.dim // 2) / self.dim)
        factors = self.long_factors if self.long_factors and context > self.original_context else self.factors
        return frequencies / np.asarray(factors) if factors else frequencies


MAX_EXPERTS = 1 << 16
"""Experts of all layers: far above any model's, for each of them is a few objects."""

ACTIVATIONS = ("silu", "gelu_tanh")
"""What a gate passes through: x * sigmoid(x), or GELU with its tanh approximation."""

ENCODER_ACTIVATIONS = ("gelu", "gelu_tanh", "silu")
"""What an encoder's feed-forward passes through: "gelu" is x times the normal distribution's share below x."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer: pre-norm, grouped-query attention, gated feed-forward.

    Tensors, by name (see `tensor_shapes`); shapes are [outputs, inputs]. `layers.N.qkv` is query, key and value
    rows one after another; `layers.N.gate_up` alternates 32 gate rows and the 32 up rows of the same columns,
    so that one tile holds what the gated activation multiplies. Norms are RMSNorm and multiply by their weights as
    they are.
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
    qkv_bias: bool = False  # queries, keys and values have one
    qk_norm: bool = False  # each head of queries and keys is normed before it is turned
    post_norms: bool = False  # what attention and feed-forward add to the residual stream is normed first
    embedding_scale: float = 1.0  # what the embedding's rows are multiplied by
    attention_scale: float | None = None  # what scores are multiplied by; None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # c: a score s becomes c * tanh(s / c); 0: none
    final_softcap: float = 0.0  # the same of logits
    windows: tuple[int, ...] = ()  # [num_layers] positions that a token attends, itself included; 0: all. Empty: all 0
    local_rope: RopeSpec | None = None  # of layers with a window, where it is another
    num_experts: int = 0  # feed-forwards of each layer, `intermediate_size` wide each; 0: one, without a router
    experts_per_token: int = 0  # those with the router's largest logits
    normalize_experts: bool = True  # their weights are the softmax of their logits alone, not of all

    def __post_init__(self) -> None:
        need = _Need(self.family)
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
        need(
            2 <= self.rope.dim <= self.head_dim and self.rope.dim % 2 == 0,
            "rope.dim",
            f"an even number from 2 to head_dim {self.head_dim}",
            self.rope.dim,
        )
        for rope in self.ropes():
            need(rope.dim == self.rope.dim, "local_rope.dim", f"that of rope, {self.rope.dim}", rope.dim)
            need(0 < rope.attention_factor < float("inf"), "attention_factor", "positive", rope.attention_factor)
            for factors in (rope.factors, rope.long_factors):
                if factors:
                    num_pairs = rope.dim // 2
                    need(len(factors) == num_pairs, "rope.factors", f"{num_pairs} values", len(factors))
                    usable = all(0 < factor < float("inf") for factor in factors)
                    need(usable, "rope.factors", "positive and finite", factors)
        need(self.activation in ACTIVATIONS, "activation", " or ".join(ACTIVATIONS), self.activation)
        need(len(self.windows) in (0, self.num_layers), "windows", f"{self.num_layers} values", len(self.windows))
        need(all(window >= 0 for window in self.windows), "windows", "at least 0", self.windows)
        need(
            0 <= self.experts_per_token <= self.num_experts and (self.experts_per_token > 0) == (self.num_experts > 0),
            "experts_per_token",
            f"from 1 to num_experts {self.num_experts}" if self.num_experts else "0 without experts",
            self.experts_per_token,
        )
        need(
            self.num_layers * self.num_experts <= MAX_EXPERTS,
            "num_layers * num_experts",
            f"at most {MAX_EXPERTS}",
            self.num_layers * self.num_experts,
        )
        for name in ("attention_softcap", "final_softcap"):
            need(0 <= getattr(self, name) < float("inf"), name, "finite and at least 0", getattr(self, name))
        for name in ("embedding_scale", "attention_scale"):
            value = getattr(self, name)
            need(value is None or 0 < value < float("inf"), name, "positive", value)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def query_scale(self) -> float:
        """What queries are multiplied by, a float32."""
        if self.attention_scale is not None:
            return float(np.float32(self.attention_scale))
        return float(np.float32(1) / np.sqrt(np.float32(self.head_dim)))

    def window(self, layer: int) -> int:
        """Positions that a token of the layer attends, itself included; 0: all."""
        return self.windows[layer] if self.windows else 0

    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different ones."""
        return (self.rope,) if self.local_rope is None else (self.rope, self.local_rope)

    def rope_index(self, layer: int) -> int:
        """Which of `ropes` the layer turns by."""
        return int(self.local_rope is not None and self.window(layer) > 0)

    def feed_forwards(self, layer: int) -> tuple[str, ...]:
        """What the names of the tensors of each of a layer's feed-forwards begin with."""
        if not self.num_experts:
            return (f"layers.{layer}.",)
        return tuple(f"layers.{layer}.experts.{expert}." for expert in range(self.num_experts))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a packed checkpoint of this spec holds. One-dimensional ones are float32, the rest packed."""
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, self.hidden_size)}
        for i in range(self.num_layers):
            shapes[f"layers.{i}.attn_norm"] = (self.hidden_size,)
            shapes[f"layers.{i}.qkv"] = (self.q_size + 2 * self.kv_size, self.hidden_size)
            if self.qkv_bias:
                shapes[f"layers.{i}.qkv_bias"] = (self.q_size + 2 * self.kv_size,)
            if self.qk_norm:
                shapes[f"layers.{i}.q_norm"] = (self.head_dim,)
                shapes[f"layers.{i}.k_norm"] = (self.head_dim,)
            shapes[f"layers.{i}.o"] = (self.hidden_size, self.q_size)
            if self.post_norms:
                shapes[f"layers.{i}.post_attn_norm"] = (self.hidden_size,)
                shapes[f"layers.{i}.post_ffn_norm"] = (self.hidden_size,)
            shapes[f"layers.{i}.ffn_norm"] = (self.hidden_size,)
            if self.num_experts:
                shapes[f"layers.{i}.router"] = (self.num_experts, self.hidden_size)
            for name in self.feed_forwards(i):
                shapes[name + "gate_up"] = (2 * self.intermediate_size, self.hidden_size)
                shapes[name + "down"] = (self.hidden_size, self.intermediate_size)
        shapes["final_norm"] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def kv_bytes_per_token(self, kv_dtype: str = "bf16") -> int:
        """Bytes of keys and values that one token of context holds, over all layers."""
        per_head = self.head_dim + 4 if kv_dtype == "int8" else 2 * self.head_dim  # quants and their float32 scale
        return self.num_layers * 2 * self.num_kv_heads * per_head


POOLINGS = ("mean", "cls")
"""How an encoder's rows become one vector: their mean, or the first one's."""


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """An encoder-only transformer: post-norm, bidirectional attention, learned positions, biases everywhere.

    Its answer to a text is a vector: the pooled rows of the last layer (an embedding), or, with `num_labels`, the
    logits of a classifier over the first row. Tensors, by name (see `tensor_shapes`); shapes are [outputs, inputs].
    `layers.N.qkv` is query, key and value rows one after another. Norms are LayerNorm.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_position: int  # tokens of a text
    norm_eps: float
    num_types: int = 2  # kinds of tokens: of the first text, of a second one beside it
    activation: str = "gelu"  # of ENCODER_ACTIVATIONS
    pooling: str = "mean"  # of POOLINGS
    normalize: bool = False  # embeddings have length 1
    num_labels: int = 0  # logits of the classifier; 0: there is none

    def __post_init__(self) -> None:
        need = _Need(self.family)
        for name in ("num_layers", "num_heads", "max_position", "num_types"):
            need(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        need(self.vocab_size >= 2, "vocab_size", "at least 2", self.vocab_size)
        need(self.num_labels >= 0, "num_labels", "at least 0", self.num_labels)
        for name in ("hidden_size", "intermediate_size"):
            size = getattr(self, name)
            need(size >= 1 and size % GROUP_SIZE == 0, name, f"a multiple of {GROUP_SIZE}", size)
        need(
            self.hidden_size % self.num_heads == 0 and self.head_dim % LANES == 0,
            "hidden_size / num_heads",
            f"a multiple of {LANES}",
            f"{self.hidden_size} / {self.num_heads}",
        )
        need(0 < self.norm_eps < 1, "norm_eps", "between 0 and 1", self.norm_eps)
        need(self.activation in ENCODER_ACTIVATIONS, "activation", " or ".join(ENCODER_ACTIVATIONS), self.activation)
        need(self.pooling in POOLINGS, "pooling", " or ".join(POOLINGS), self.pooling)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def output_size(self) -> int:
        """Numbers in the answer to one text."""
        return self.num_labels or self.hidden_size

    def query_scale(self) -> float:
        """What queries are multiplied by, a float32."""
        return float(np.float32(1) / np.sqrt(np.float32(self.head_dim)))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor a packed checkpoint of this spec holds. One-dimensional ones are float32, the rest packed."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embed": (self.vocab_size, hidden),
            "positions": (self.max_position, hidden),
            "types": (self.num_types, hidden),
            "embed_norm": (hidden,),
            "embed_norm_bias": (hidden,),
        }
        for i in range(self.num_layers):
            for name, outputs, inputs in (
                ("qkv", 3 * hidden, hidden),
                ("o", hidden, hidden),
                ("up", inner, hidden),
                ("down", hidden, inner),
            ):
                shapes[f"layers.{i}.{name}"] = (outputs, inputs)
                shapes[f"layers.{i}.{name}_bias"] = (outputs,)
            for name in ("attn_norm", "ffn_norm"):
                shapes[f"layers.{i}.{name}"] = (hidden,)
                shapes[f"layers.{i}.{name}_bias"] = (hidden,)
        if self.num_labels:
            shapes["pooler"] = (hidden, hidden)
            shapes["pooler_bias"] = (hidden,)
            shapes["classifier"] = (self.num_labels, hidden)
            shapes["classifier_bias"] = (self.num_labels,)
        return shapes


@dataclass(frozen=True, slots=True)
class OpaqueSpec:
    """A decoder of which no more is known here: another engine computes it."""

    family: str  # as its config.json names it
    vocab_size: int  # tokens of the tokenizer


class _Need:
    """Raises UnsupportedModelError, with what was expected and what the checkpoint has, unless something holds."""

    def __init__(self, family: str) -> None:
        self._family = family

    def __call__(self, ok: bool, what: str, expected: str, got: object) -> None:
        if not ok:
            raise UnsupportedModelError(f"{self._family}: {what} must be {expected}, the checkpoint has {got}.")


@dataclass(frozen=True, slots=True)
class ModelInfo(Generic[Spec]):
    """What text and serving need to know of a checkpoint beside its weights."""

    spec: Spec
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
