"""The kernels' arithmetic in numpy: slow, read from top to bottom, and what every native build is tested against.

One step is, for the flat tokens of all requests: an embedding row each; per layer attention and the gated
feed-forward, both added onto the residual; a final norm, the head and the sampler for the rows that want them.
Everything is float32 except the integer dot products inside a projection of quants and the sampler's sums.

The order of every sum and the place of every rounding are part of the definition. Rounding activations to 8 bits
makes that necessary: a last bit that differs moves some activation to the next level, and over 30 layers two such
computations drift as far apart (cosine 0.9993 of the default model's logits) as either is from float32. Builds with
fused multiply-adds therefore give this module's logits bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config import BLOCK_SIZE, KV_DTYPES
from engine.kernels.batch import Float32, Int32, StepBatch, Weights
from engine.kernels.layout import GROUP, LANES, PackedTensor, dequantize, from_bf16, to_bf16, unpack_matrix
from engine.kernels.reference_math import exp, fma, sum_lanes
from engine.kernels.reference_sampler import sample
from engine.kernels.validate import check_batch, check_copies, check_weights
from engine.models.spec import DecoderSpec, RopeSpec

Activations = Literal["int8", "float32"]

SEGMENT = 512
"""Positions whose softmax is computed apart, so that several threads can share a long context."""

_COLUMNS = 1024  # outputs of a projection computed together, so that they stay in the cache


class ReferenceProgram:
    """The `Program` that computes in numpy.

    `activations` "int8" is the native arithmetic: what a matrix of quants multiplies is rounded to 8 bits per (row,
    group of 32), a matrix of bfloat16 multiplies float32, and a row's result does not depend, in any bit, on the other
    rows of the step. "float32" keeps all activations and the dequantized weights in float32, which is what a float32
    implementation of the model computes; its products go through BLAS, whose rounding depends on the number of rows.
    `kv_dtype` "float32" leaves keys and values unrounded, which no build does. Raises ValueError for weights that do
    not fit `spec`.
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
        kv_dtype: str = "bf16",
    ) -> None:
        check_weights(spec, weights)
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected at least 1, got {num_blocks}")
        if activations not in ("int8", "float32") or kv_dtype not in (*KV_DTYPES, "float32"):
            raise ValueError(
                "expected activations int8 or float32 and kv_dtype bf16, int8 or float32, "
                f"got {activations} and {kv_dtype}"
            )
        self.spec = spec
        self.num_blocks = num_blocks
        self._kv_dtype = kv_dtype
        make = kernel_matrix if activations == "int8" else FloatMatrix
        self._matrices: dict[str, Matrix] = {
            name: make(tensor) for name, tensor in weights.items() if tensor.format is not None
        }
        self._vectors = {name: np.asarray(t.data, np.float32) for name, t in weights.items() if t.format is None}
        # [block, layer, key or value, KV head, slot, lane]: a block is one contiguous piece. bf16 values, or integers,
        # in float32. The last lane is what the others are to be multiplied by: 1 where they are not quants.
        self._kv: Float32 | None = np.zeros(
            (num_blocks, spec.num_layers, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim + 1), np.float32
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

        `kv` [block, 2, KV head, slot, lane] receives the keys and values of this step first. Queries carry the
        softmax's scale 1 / sqrt(head_dim).
        """
        spec = self.spec
        cos, sin = rope_tables(batch.positions, spec.rope)
        queries = rotate(q.reshape(-1, spec.num_heads, spec.head_dim), cos, sin)
        queries *= np.float32(1) / np.sqrt(np.float32(spec.head_dim))
        keys = rotate(k.reshape(-1, spec.num_kv_heads, spec.head_dim), cos, sin)
        values = v.reshape(-1, spec.num_kv_heads, spec.head_dim)

        request_of_token = np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_starts))
        blocks = batch.block_tables[0, request_of_token, batch.positions // BLOCK_SIZE]
        slots = batch.positions % BLOCK_SIZE
        kv[blocks, 0, :, slots] = self._stored(keys)
        kv[blocks, 1, :, slots] = self._stored(values)

        attended = np.empty_like(queries)
        for r, seq_len in enumerate(batch.seq_lens):
            rows = slice(batch.query_starts[r], batch.query_starts[r + 1])
            limits = batch.positions[rows] + 1 if batch.causal else np.full(rows.stop - rows.start, seq_len)
            context = kv[batch.block_tables[0, r, : -(-seq_len // BLOCK_SIZE)]]
            attended[rows] = attend(queries[rows], context, limits, quantized=self._kv_dtype == "int8")
        return attended.reshape(-1, spec.q_size)

    def _stored(self, vectors: Float32) -> Float32:
        """Keys or values [T, KV head, lane] as the KV memory keeps them: lanes, then their factor."""
        if self._kv_dtype == "int8":
            quants, scales = quantize_vectors(vectors)
            return np.concatenate([quants, scales[..., None]], axis=-1)
        lanes = from_bf16(to_bf16(vectors)) if self._kv_dtype == "bf16" else vectors
        return np.concatenate([lanes, np.ones_like(lanes[..., :1])], axis=-1)


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
        out = np.empty((len(x), self._quants.shape[1]), np.float32)
        for begin in range(0, out.shape[1], _COLUMNS):
            columns = slice(begin, begin + _COLUMNS)
            total = np.zeros_like(out[:, columns])
            for g in range(len(self._quants)):  # in this order
                # Integers below 2**24 in float32: these products and their sums are exact in any order.
                dots = quants[:, g] @ self._quants[g, columns].T.astype(np.float32)
                dots -= self._zero_point * sums[:, g, None]
                total = fma(dots * self._scales[g, columns], scales[:, g, None], total)
                if self._mins is not None:
                    total = fma(self._mins[g, columns], scales[:, g, None] * sums[:, g, None], total)
            out[:, columns] = total
        return out


class Bf16Matrix:
    """Float32 multiply-adds of bfloat16 weights and float32 activations, summed by group of 32 inputs."""

    def __init__(self, tensor: PackedTensor) -> None:
        assert tensor.format is not None
        self._weights = dequantize(tensor.format, tensor.data.view(np.uint8))

    def rows(self, ids: Int32) -> Float32:
        return self._weights[ids]

    def project(self, x: Float32) -> Float32:
        inputs = np.ascontiguousarray(x.T)  # [k, M]
        out = np.empty((len(x), len(self._weights)), np.float32)
        for begin in range(0, out.shape[1], _COLUMNS):
            columns = slice(begin, begin + _COLUMNS)
            weights = np.ascontiguousarray(self._weights[columns].T)  # [k, n]
            total = np.zeros_like(out[:, columns])
            for first in range(0, len(weights), GROUP):  # in this order
                group = np.zeros_like(total)
                for k in range(first, first + GROUP):  # and in this one
                    group = fma(inputs[k, :, None], weights[k], group)
                total += group
            out[:, columns] = total
        return out


def kernel_matrix(tensor: PackedTensor) -> Matrix:
    """A matrix that multiplies as the kernels do."""
    assert tensor.format is not None
    return QuantizedMatrix(tensor) if tensor.format.is_quantized else Bf16Matrix(tensor)


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
    quants, scales = quantize_vectors(x.reshape(len(x), -1, GROUP))
    return quants, scales, quants.sum(axis=-1)


def quantize_vectors(x: Float32, bits: int = 8) -> tuple[Float32, Float32]:
    """Round vectors [..., n] to `bits` with one scale each: quants, integers in float32 [..., n], and scales [...]."""
    most = np.float32(2 ** (bits - 1) - 1)
    amax = np.abs(x).max(axis=-1)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = most / amax
    inverse[np.isinf(inverse)] = 0
    return np.clip(np.rint(x * inverse[..., None]), -most, most), amax / most


def integer_product(a: Float32, b: Float32) -> Float32:
    """a [..., m, k] @ b [..., k, n] of integers, each sum exact and then rounded to float32."""
    product: Float32 = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    return product


def rms_norm(x: Float32, weight: Float32, eps: float) -> Float32:
    """Scale rows [T, hidden] to a root mean square of 1, then columns by `weight` (Zhang and Sennrich, 2019)."""
    lanes = np.zeros((len(x), LANES), np.float32)
    for part in np.split(x, x.shape[1] // LANES, axis=1):
        lanes = fma(part, part, lanes)
    mean = sum_lanes(lanes)[:, None] / np.float32(x.shape[1])
    normed: Float32 = x * (np.float32(1) / np.sqrt(mean + np.float32(eps))) * weight
    return normed


def gated_silu(gate_up: Float32) -> Float32:
    """silu(gate) * up of [T, 2 * intermediate], where 32 gate columns alternate with the 32 up columns they gate."""
    pairs = gate_up.reshape(len(gate_up), -1, 2, GROUP)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    gated: Float32 = gate / (1 + exp(-gate)) * up
    return gated.reshape(len(gate_up), -1)


def rope_tables(positions: Int32, rope: RopeSpec) -> tuple[Float32, Float32]:
    """cos and sin of each pair's angle, computed in float64; float32 [T, 1, dim / 2]."""
    angles = positions[:, None, None] * rope.frequencies()
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(heads: Float32, cos: Float32, sin: Float32) -> Float32:
    """Turn lane i of each head [T, heads, dim] with lane i + dim / 2 (Su et al., 2021, in the half-split order)."""
    low, high = np.split(heads, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)


def attend(queries: Float32, context: Float32, limits: NDArray[np.integer], *, quantized: bool = False) -> Float32:
    """Softmax attention of one request's rows; queries [rows, heads, head_dim], and so is the result.

    `context` [block, 2, KV head, slot, lanes and their factor] are its keys and values; row i sees positions 0 to
    limits[i] - 1, and `limits` never falls. Beside lanes that are 8-bit integers, `quantized`, queries and weights
    become 16-bit integers. Each segment of 512 positions has a softmax of its own, the segments are folded in order.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = context.shape[2]
    grouped = queries.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    whole = Softmax.empty(grouped)
    for first in range(0, len(context) * BLOCK_SIZE, SEGMENT):
        # The rows that see this segment are the last ones.
        row = int(np.searchsorted(limits, first, side="right"))
        segment = Softmax.empty(grouped[row:])
        for block in range(first // BLOCK_SIZE, min((first + SEGMENT) // BLOCK_SIZE, len(context))):
            segment.add_block(grouped[row:], context[block], limits[row:] - block * BLOCK_SIZE, quantized)
        whole.fold(row, segment)
    out = whole.out * (np.float32(1) / sum_lanes(whole.sums))[..., None]
    return out.reshape(queries.shape)


@dataclass(slots=True)
class Softmax:
    """Running softmax of query vectors [rows, KV head, query heads of it] (Milakov and Gimelshein, 2018)."""

    top: Float32  # [...] the largest score so far, -inf at first
    sums: Float32  # [..., 16] of weights e**(score - top), by position modulo 16
    out: Float32  # [..., head_dim] sum of weight * value, in order of position

    @classmethod
    def empty(cls, queries: Float32) -> Softmax:
        shape = queries.shape[:-1]
        return cls(np.full(shape, -np.inf, np.float32), np.zeros((*shape, LANES), np.float32), np.zeros_like(queries))

    def add_block(self, queries: Float32, block: Float32, counts: NDArray[np.integer], quantized: bool) -> None:
        """One block of a context, of which row i sees the first counts[i] slots (none where <= 0)."""
        row = int(np.searchsorted(counts, 0, side="right"))
        if row == len(queries):
            return
        queries, counts = queries[row:], counts[row:]
        top, sums, out = self.top[row:], self.sums[row:], self.out[row:]
        keys, values = block[:, None, :, None]  # [1, KV head, 1, slot, lane]
        if quantized:
            quants, scales = quantize_vectors(queries, bits=16)
            scores = integer_product(quants, block[0, ..., :-1].swapaxes(-1, -2)) * keys[..., -1] * scales[..., None]
        else:
            scores = np.zeros((*top.shape, BLOCK_SIZE), np.float32)
            for lane in range(queries.shape[-1]):
                scores = fma(queries[..., lane, None], keys[..., lane], scores)
        seen = (np.arange(BLOCK_SIZE) < counts[:, None])[:, None, None]
        scores = np.where(seen, scores, np.float32(-np.inf))

        higher = np.maximum(top, scores.max(axis=-1))
        shrink = exp(top - higher)[..., None]  # 1 where the top stays, 0 at the first block
        sums *= shrink
        out *= shrink
        top[...] = higher
        weights = exp(scores - higher[..., None])  # 0 where not seen
        sums += weights[..., :LANES] + weights[..., LANES:]
        if quantized:
            quants, scales = quantize_vectors(weights * values[..., -1], bits=16)
            out[...] = fma(integer_product(quants, block[1, ..., :-1]), scales[..., None], out)
            return
        for slot in range(BLOCK_SIZE):
            seeing = int(np.searchsorted(counts, slot, side="right"))
            out[seeing:] = fma(weights[seeing:, ..., slot, None], values[..., slot, :-1], out[seeing:])

    def fold(self, row: int, later: Softmax) -> None:
        """Add the positions of `later`, which has the rows from `row` on."""
        top, sums, out = self.top[row:], self.sums[row:], self.out[row:]
        higher = np.maximum(top, later.top)
        ours, theirs = exp(top - higher)[..., None], exp(later.top - higher)[..., None]
        sums[...] = fma(later.sums, theirs, sums * ours)
        out[...] = fma(later.out, theirs, out * ours)
        top[...] = higher
