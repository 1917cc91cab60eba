"""The kernels' arithmetic in numpy: slow, read from top to bottom, and what every native build is tested against.

One step is, for the flat tokens of all requests: an embedding row each; per layer attention and the gated
feed-forward, both added onto the residual; a final norm, the head and the sampler for the rows that want them.
Everything is float32 except the integer dot products inside a quantized projection and the sampler's sums.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config import BLOCK_SIZE
from engine.kernels.batch import Float32, Int32, StepBatch, Weights
from engine.kernels.layout import GROUP, PackedTensor, dequantize, unpack_matrix
from engine.kernels.reference_sampler import sample
from engine.kernels.validate import check_batch, check_copies, check_weights
from engine.models.spec import DecoderSpec, RopeSpec

Activations = Literal["int8", "float32"]
KvDtype = Literal["bf16", "float32"]


class ReferenceProgram:
    """The `Program` that computes in numpy.

    `activations` "int8" is the native arithmetic: activations are rounded to 8 bits per (row, group of 32), and a
    row's result does not depend, in any bit, on the other rows of the step. "float32" keeps activations and the
    dequantized weights in float32, which is what a float32 implementation of the model computes; its products go
    through BLAS, whose rounding depends on the number of rows. `kv_dtype` "float32" also leaves keys and values
    unrounded. Raises ValueError for weights that do not fit `spec`.
    """

    isa = "reference"
    threads = 1

    def __init__(
        self,
        spec: DecoderSpec,
        weights: Weights,
        *,
        num_blocks: int,
        activations: Activations = "int8",
        kv_dtype: KvDtype = "bf16",
    ) -> None:
        check_weights(spec, weights)
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
        if activations not in ("int8", "float32") or kv_dtype not in ("bf16", "float32"):
            raise ValueError(
                f"expected activations int8 or float32 and kv_dtype bf16 or float32, got {activations} and {kv_dtype}"
            )
        self.spec = spec
        self.num_blocks = num_blocks
        self._round_kv = kv_dtype == "bf16"
        make = QuantizedMatrix if activations == "int8" else FloatMatrix
        self._matrices: dict[str, Matrix] = {
            name: make(tensor) for name, tensor in weights.items() if tensor.format is not None
        }
        self._vectors = {name: np.asarray(t.data, np.float32) for name, t in weights.items() if t.format is None}
        # [block, layer, key or value, KV head, slot, lane]: a block is one contiguous piece. bf16 values in float32.
        self._kv: Float32 | None = np.zeros(
            (num_blocks, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim), np.float32
        )
        self._chosen: Int32 = np.empty(0, np.int32)  # by the previous step

    def step(self, batch: StepBatch) -> Int32:
        """See `Program.step`."""
        kv = self._memory()
        check_batch(self.spec, batch, self.num_blocks, len(self._chosen))
        spec = self.spec

        token_ids = batch.token_ids.copy()
        deferred = token_ids < 0
        token_ids[deferred] = np.maximum(self._chosen[-1 - token_ids[deferred]], 0)
        x = self._matrices["embed"].rows(token_ids)  # float32 [T, hidden], the residual stream

        for i in range(spec.num_layers):
            layer = f"layers.{i}."
            normed = rms_norm(x, self._vectors[layer + "attn_norm"], spec.norm_eps)
            qkv = self._matrices[layer + "qkv"].project(normed)
            q, k, v = np.split(qkv, (spec.q_size, spec.q_size + spec.kv_size), axis=1)
            attended = self._attention(kv[:, i], batch, q, k, v)
            x = x + self._matrices[layer + "o"].project(attended)

            normed = rms_norm(x, self._vectors[layer + "ffn_norm"], spec.norm_eps)
            gated = gated_silu(self._matrices[layer + "gate_up"].project(normed))
            x = x + self._matrices[layer + "down"].project(gated)

        self._chosen = np.empty(0, np.int32)
        if len(batch.logits_rows) and not (batch.sampling is None and batch.logits is None and batch.hidden is None):
            hidden = rms_norm(x[batch.logits_rows], self._vectors["final_norm"], spec.norm_eps)
            if batch.hidden is not None:
                batch.hidden[...] = hidden
            if batch.sampling is not None or batch.logits is not None:
                logits = self._matrices["embed" if spec.tie_embeddings else "head"].project(hidden)
                if batch.logits is not None:
                    batch.logits[...] = logits
                if batch.sampling is not None:
                    self._chosen = sample(logits, batch.sampling)
        return self._chosen.copy()

    def copy_blocks(self, pairs: Int32) -> None:
        """See `Program.copy_blocks`."""
        kv = self._memory()
        check_copies(pairs, self.num_blocks)
        kv[pairs[:, 1]] = kv[pairs[:, 0]]

    def close(self) -> None:
        """See `Program.close`."""
        self._kv = None

    def _memory(self) -> Float32:
        if self._kv is None:
            raise RuntimeError("the program is closed")
        return self._kv

    def _attention(self, kv: Float32, batch: StepBatch, q: Float32, k: Float32, v: Float32) -> Float32:
        """Grouped-query attention over one layer's paged keys and values; q, k, v [T, heads * head_dim] -> [T, q_size].

        `kv` [block, 2, KV head, slot, lane] receives the keys and values of this step first.
        """
        spec = self.spec
        shared = spec.num_heads // spec.num_kv_heads  # query heads per KV head
        num_tokens = len(q)
        cos, sin = rope_tables(batch.positions, spec.rope)
        queries = rotate(q.reshape(num_tokens, spec.num_heads, spec.head_dim), cos, sin)
        queries = queries.reshape(num_tokens, spec.num_kv_heads, shared, spec.head_dim)
        keys = rotate(k.reshape(num_tokens, spec.num_kv_heads, spec.head_dim), cos, sin)
        values = v.reshape(num_tokens, spec.num_kv_heads, spec.head_dim)
        if self._round_kv:
            keys, values = round_to_bf16(keys), round_to_bf16(values)

        request_of_token = np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_starts))
        blocks = batch.block_tables[0, request_of_token, batch.positions // BLOCK_SIZE]
        slots = batch.positions % BLOCK_SIZE
        kv[blocks, 0, :, slots] = keys
        kv[blocks, 1, :, slots] = values

        scale = np.float32(1.0 / np.sqrt(spec.head_dim))
        out = np.empty_like(queries)
        for r, seq_len in enumerate(batch.seq_lens):
            table = batch.block_tables[0, r, : -(-seq_len // BLOCK_SIZE)]
            # [2, KV head, position, lane], every position of the request
            context = kv[table].transpose(1, 2, 0, 3, 4).reshape(2, spec.num_kv_heads, -1, spec.head_dim)
            # Token by token: shapes that depend on its position alone make its rounding do so too.
            for t in range(batch.query_starts[r], batch.query_starts[r + 1]):
                visible = batch.positions[t] + 1 if batch.causal else seq_len
                past_keys, past_values = context[:, :, :visible]
                scores = queries[t] @ past_keys.swapaxes(1, 2) * scale  # [KV head, shared, position]
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                out[t] = weights @ past_values / weights.sum(axis=-1, keepdims=True)
        return out.reshape(num_tokens, spec.q_size)


class Matrix(Protocol):
    """One matrix [outputs n, inputs k] as a program holds it."""

    def rows(self, ids: Int32) -> Float32:
        """The dequantized rows `ids`, float32 [len(ids), k]."""
        ...

    def project(self, x: Float32) -> Float32:
        """x float32 [M, k] times the matrix, float32 [M, n]."""
        ...


class QuantizedMatrix:
    """Integer dot products of quantized weights and quantized activations, one per group of 32 inputs."""

    def __init__(self, tensor: PackedTensor) -> None:
        assert tensor.format is not None
        fmt = tensor.format
        quants, scales, mins = unpack_matrix(fmt, tensor.data.view(np.uint8))
        self._quants = np.ascontiguousarray(quants.reshape(fmt.n, fmt.num_groups, GROUP).swapaxes(0, 1))  # [G, n, 32]
        self._scales = np.ascontiguousarray(scales.T.astype(np.float32))  # [G, n]
        self._mins = None if mins is None else np.ascontiguousarray(mins.T.astype(np.float32))
        self._zero_point = np.float32(fmt.zero_point if mins is None else 0)

    def rows(self, ids: Int32) -> Float32:
        quants = self._quants[:, ids].astype(np.float32)  # [G, M, 32]
        weights = self._scales[:, ids, None] * (quants - self._zero_point)
        if self._mins is not None:
            weights += self._mins[:, ids, None]
        return weights.swapaxes(0, 1).reshape(len(ids), -1)

    def project(self, x: Float32) -> Float32:
        quants, scales, sums = quantize_activations(x)
        out = np.zeros((len(x), self._quants.shape[1]), np.float32)
        for g in range(len(self._quants)):  # in this order: the sum over groups is rounded at each
            # Integers below 2**24 in float32, so the products and their sums are exact in any order.
            part = quants[:, g] @ self._quants[g].T.astype(np.float32)
            part -= self._zero_point * sums[:, g, None]
            part *= self._scales[g]
            part *= scales[:, g, None]
            out += part
            if self._mins is not None:
                out += self._mins[g] * (scales[:, g, None] * sums[:, g, None])
        return out


class FloatMatrix:
    """Dequantized weights and float32 activations."""

    def __init__(self, tensor: PackedTensor) -> None:
        assert tensor.format is not None
        self._weights = dequantize(tensor.format, tensor.data.view(np.uint8))

    def rows(self, ids: Int32) -> Float32:
        return self._weights[ids]

    def project(self, x: Float32) -> Float32:
        return x @ self._weights.T


def quantize_activations(x: Float32) -> tuple[Float32, Float32, Float32]:
    """Round rows [M, k] to 8 bits with one scale per (row, group): quants [M, k / 32, 32], scales and sums [M, k / 32].

    Quants and their sums are integers held in float32. A group of zeros (or of values so small that 127 / amax is not
    finite) becomes zeros.
    """
    groups = x.reshape(len(x), -1, GROUP)
    amax = np.abs(groups).max(axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(127) / amax
    inverse[np.isinf(inverse)] = 0
    quants = np.clip(np.rint(groups * inverse[:, :, None]), -127, 127)
    return quants, amax / np.float32(127), quants.sum(axis=-1)


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Scale each row to a root mean square of 1, then each column by `weight` (Zhang and Sennrich, 2019)."""
    mean: Float32 = np.square(x).mean(axis=-1, keepdims=True)
    normed: Float32 = x * (np.float32(1) / np.sqrt(mean + np.float32(eps))) * weight
    return normed


def gated_silu(gate_up: Float32) -> Float32:
    """silu(gate) * up of [T, 2 * intermediate], where 32 gate columns alternate with the 32 up columns they gate."""
    pairs = gate_up.reshape(len(gate_up), -1, 2, GROUP)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    with np.errstate(over="ignore"):  # exp of a large -gate is infinite, and silu then 0
        silu: Float32 = gate / (1 + np.exp(-gate))
    return (silu * up).reshape(len(gate_up), -1)


def rope_tables(positions: Int32, rope: RopeSpec) -> tuple[Float32, Float32]:
    """cos and sin of position * theta**(-2 i / dim), computed in float64; float32 [T, 1, dim / 2]."""
    frequencies = rope.theta ** (-2.0 * np.arange(rope.dim // 2) / rope.dim)
    angles = positions[:, None, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(heads: Float32, cos: Float32, sin: Float32) -> Float32:
    """Turn lane i of each head [T, heads, dim] with lane i + dim / 2 (Su et al., 2021, in the half-split order)."""
    low, high = np.split(heads, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def round_to_bf16(x: Float32) -> Float32:
    """Round to the nearest bfloat16, ties to even; the result is float32 again."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded: NDArray[np.uint32] = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(np.float32))
