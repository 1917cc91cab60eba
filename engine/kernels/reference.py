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
from engine.kernels.batch import Float32, Int32, LogprobArrays, SamplingArrays, StepBatch, UInt32, Weights
from engine.kernels.layout import GROUP, LANES, PackedTensor, dequantize, from_bf16, to_bf16, unpack_matrix
from engine.kernels.reference_math import exp, fma, gelu_tanh, silu, softcapped, sum_lanes
from engine.kernels.reference_sampler import rows_of, sample, sample_row, write_logprobs
from engine.kernels.validate import check_again, check_batch, check_copies, check_weights
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
    num_ranks = 1

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
        self._chosen: Int32 = np.empty(0, np.int32)  # by the previous step, whose rest is kept to choose again
        self._last: tuple[Float32, SamplingArrays, LogprobArrays | None] | None = None

    def step(self, batch: StepBatch) -> Int32:
        """See `Program.step`."""
        kv = self._memory()
        check_batch(self.spec, batch, self.num_blocks, len(self._chosen))
        spec = self.spec

        token_ids = batch.token_ids.copy()
        deferred = token_ids < 0
        token_ids[deferred] = np.maximum(self._chosen[-1 - token_ids[deferred]], 0)
        x = self._matrices["embed"].rows(token_ids)  # float32 [T, hidden], the residual stream
        x = x * np.float32(spec.embedding_scale)

        for i in range(spec.num_layers):
            layer = f"layers.{i}."
            attended = self._attention(kv[:, i], batch, i, self._normed(layer + "attn_norm", x))
            x = x + self._normed(layer + "post_attn_norm", self._matrices[layer + "o"].project(attended))

            normed = self._normed(layer + "ffn_norm", x)
            added = self._experts(i, normed) if spec.num_experts else self._feed_forward(layer, normed)
            x = x + self._normed(layer + "post_ffn_norm", added)

        self._chosen, self._last = np.empty(0, np.int32), None
        if len(batch.logits_rows) and not (batch.sampling is None and batch.logits is None and batch.hidden is None):
            hidden = rms_norm(x[batch.logits_rows], self._vectors["final_norm"], spec.norm_eps)
            if batch.hidden is not None:
                batch.hidden[...] = hidden
            if batch.sampling is not None or batch.logits is not None:
                logits = self._matrices["embed" if spec.tie_embeddings else "head"].project(hidden)
                logits = softcapped(logits, spec.final_softcap)
                if batch.logits is not None:
                    batch.logits[...] = logits
                if batch.sampling is not None:
                    self._chosen = sample(logits, batch.sampling)
                    self._last = logits, batch.sampling, batch.logprobs
                if batch.logprobs is not None:
                    given = batch.logprobs.targets
                    self._chosen = np.where(given >= 0, given, self._chosen)
                    write_logprobs(logits, self._chosen, batch.logprobs)
        return self._chosen.copy()

    def choose_again(self, row: int, mask: UInt32) -> int:
        """See `Program.choose_again`."""
        self._memory()
        check_again(None if self._last is None else self._last[1], row, mask, self.spec.vocab_size)
        assert self._last is not None
        logits, sampling, logprobs = self._last
        self._chosen[row] = sample_row(logits[row], sampling, row, mask)
        if logprobs is not None:  # of this row alone: another thread may be at another one
            only = slice(row, row + 1)
            write_logprobs(logits[only], self._chosen[only], rows_of(logprobs, only))
        return int(self._chosen[row])

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

    def _normed(self, name: str, x: Float32) -> Float32:
        """x after the norm of that name, where the model has it."""
        weight = self._vectors.get(name)
        return x if weight is None else rms_norm(x, weight, self.spec.norm_eps)

    def _feed_forward(self, name: str, normed: Float32) -> Float32:
        """The gated feed-forward whose tensors' names begin with `name`; [T, hidden] -> [T, hidden]."""
        gate_up = self._matrices[name + "gate_up"].project(normed)
        return self._matrices[name + "down"].project(gated(gate_up, self.spec.activation))

    def _experts(self, layer: int, normed: Float32) -> Float32:
        """A mixture of experts: of each token the weighted sum of what its experts make of it, the best one's first."""
        spec = self.spec
        logits = self._matrices[f"layers.{layer}.router"].project(normed)
        chosen, weights = route(logits, spec.experts_per_token, normalize=spec.normalize_experts)
        made = np.zeros((*chosen.shape, spec.hidden_size), np.float32)
        for expert, name in enumerate(spec.feed_forwards(layer)):
            tokens, slots = np.nonzero(chosen == expert)
            if len(tokens):
                made[tokens, slots] = self._feed_forward(name, normed[tokens])
        total = np.zeros_like(normed)
        for slot in range(spec.experts_per_token):
            total = fma(weights[:, slot, None], made[:, slot], total)
        return total

    def _attention(self, kv: Float32, batch: StepBatch, layer: int, normed: Float32) -> Float32:
        """Grouped-query attention over one layer's paged keys and values; normed [T, hidden] -> [T, q_size].

        `kv` [block, 2, KV head, slot, lane] receives the keys and values of this step first. Queries carry the
        softmax's scale.
        """
        spec, name = self.spec, f"layers.{layer}."
        qkv = self._matrices[name + "qkv"].project(normed)
        if spec.qkv_bias:
            qkv = qkv + self._vectors[name + "qkv_bias"]
        q, k, v = np.split(qkv, (spec.q_size, spec.q_size + spec.kv_size), axis=1)
        queries = q.reshape(-1, spec.num_heads, spec.head_dim)
        keys = k.reshape(-1, spec.num_kv_heads, spec.head_dim)
        values = v.reshape(-1, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            queries, keys = self._normed(name + "q_norm", queries), self._normed(name + "k_norm", keys)
        cos, sin = rope_tables(batch.positions, spec.ropes()[spec.rope_index(layer)], spec.max_position)
        queries = rotate(queries, cos, sin) * np.float32(spec.query_scale())
        keys = rotate(keys, cos, sin)

        request_of_token = np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_starts))
        blocks = batch.block_tables[0, request_of_token, batch.positions // BLOCK_SIZE]
        slots = batch.positions % BLOCK_SIZE
        kv[blocks, 0, :, slots] = self._stored(keys)
        kv[blocks, 1, :, slots] = self._stored(values)

        attended = np.empty_like(queries)
        for r, seq_len in enumerate(batch.seq_lens):
            rows = slice(batch.query_starts[r], batch.query_starts[r + 1])
            after = batch.positions[rows] + 1
            limits = after if batch.causal else np.full_like(after, seq_len)
            window = spec.window(layer)
            lows = np.maximum(after - window, 0) if window else np.zeros_like(after)
            context = kv[batch.block_tables[0, r, : -(-seq_len // BLOCK_SIZE)]]
            attended[rows] = attend(
                queries[rows], context, lows, limits, softcap=spec.attention_softcap, quantized=self._kv_dtype == "int8"
            )
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
    """Scale vectors [..., n] to a root mean square of 1, then lanes by `weight` (Zhang and Sennrich, 2019)."""
    lanes = np.zeros((*x.shape[:-1], LANES), np.float32)
    for part in np.split(x, x.shape[-1] // LANES, axis=-1):
        lanes = fma(part, part, lanes)
    mean = sum_lanes(lanes)[..., None] / np.float32(x.shape[-1])
    normed: Float32 = x * (np.float32(1) / np.sqrt(mean + np.float32(eps))) * weight
    return normed


def gated(gate_up: Float32, activation: str) -> Float32:
    """activation(gate) * up of [T, 2 * intermediate], where 32 gate columns alternate with the 32 up columns they
    gate."""
    pairs = gate_up.reshape(len(gate_up), -1, 2, GROUP)
    gate, up = pairs[:, :, 0], pairs[:, :, 1]
    passed: Float32 = (silu(gate) if activation == "silu" else gelu_tanh(gate)) * up
    return passed.reshape(len(gate_up), -1)


def route(logits: Float32, wanted: int, *, normalize: bool) -> tuple[NDArray[np.int64], Float32]:
    """The experts with the `wanted` largest logits of each token, of equal ones the first, and their weights: the
    softmax of all logits [T, experts] or, normalized, of theirs alone. Both [T, wanted], the best first."""
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :wanted]
    sizes = exp(logits - np.take_along_axis(logits, chosen[:, :1], axis=1))
    weights = np.take_along_axis(sizes, chosen, axis=1)
    total = np.zeros(len(logits), np.float32)
    for column in (weights if normalize else sizes).T:  # in this order
        total = total + column
    return chosen, weights / total[:, None]


def rope_tables(positions: Int32, rope: RopeSpec, context: int = 0) -> tuple[Float32, Float32]:
    """cos and sin of each pair's angle, computed in float64; float32 [T, 1, dim / 2]."""
    angles = positions[:, None, None] * rope.frequencies(context)
    factor = rope.attention_factor
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def rotate(heads: Float32, cos: Float32, sin: Float32) -> Float32:
    """Turn lane i of each head [T, heads, head_dim] with lane i + dim / 2 (Su et al., 2021, in the half-split order);
    lanes from dim on stay. cos and sin [T, 1, dim / 2]."""
    half = cos.shape[-1]
    low, high, rest = np.split(heads, (half, 2 * half), axis=-1)
    return np.concatenate((low * cos - high * sin, high * cos + low * sin, rest), axis=-1)


def attend(
    queries: Float32,
    context: Float32,
    lows: NDArray[np.integer],
    limits: NDArray[np.integer],
    *,
    softcap: float = 0.0,
    quantized: bool = False,
) -> Float32:
    """Softmax attention of one request's rows; queries [rows, heads, head_dim], and so is the result.

    `context` [block, 2, KV head, slot, lanes and their factor] are its keys and values; row i sees positions lows[i] to
    limits[i] - 1, and neither ever falls. Beside lanes that are 8-bit integers, `quantized`, queries and weights
    become 16-bit integers. Each segment of 512 positions has a softmax of its own, the segments are folded in order.
    """
    num_rows, num_heads, head_dim = queries.shape
    num_kv_heads = context.shape[2]
    grouped = queries.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    whole = Softmax.empty(grouped)
    for first in range(0, len(context) * BLOCK_SIZE, SEGMENT):
        # The rows that see this segment stand together.
        rows = seeing(lows, limits, first, first + SEGMENT)
        segment = Softmax.empty(grouped[rows])
        for block in range(first // BLOCK_SIZE, min((first + SEGMENT) // BLOCK_SIZE, len(context))):
            begin = block * BLOCK_SIZE
            segment.add_block(
                grouped[rows], context[block], lows[rows] - begin, limits[rows] - begin, softcap, quantized
            )
        whole.fold(rows, segment)
    out = whole.out * (np.float32(1) / sum_lanes(whole.sums))[..., None]
    return out.reshape(queries.shape)


def seeing(lows: NDArray[np.integer], limits: NDArray[np.integer], begin: int, end: int) -> slice:
    """The rows that see one of the positions [begin, end)."""
    return slice(int(np.searchsorted(limits, begin, side="right")), int(np.searchsorted(lows, end, side="left")))


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

    def add_block(
        self,
        queries: Float32,
        block: Float32,
        begins: NDArray[np.integer],
        counts: NDArray[np.integer],
        softcap: float,
        quantized: bool,
    ) -> None:
        """One block of a context, of which row i sees the slots from begins[i] to counts[i] - 1 that there are."""
        rows = seeing(begins, counts, 0, BLOCK_SIZE)
        if rows.start >= rows.stop:
            return
        queries, begins, counts = queries[rows], begins[rows], counts[rows]
        top, sums, out = self.top[rows], self.sums[rows], self.out[rows]
        keys, values = block[:, None, :, None]  # [1, KV head, 1, slot, lane]
        if quantized:
            quants, scales = quantize_vectors(queries, bits=16)
            scores = integer_product(quants, block[0, ..., :-1].swapaxes(-1, -2)) * keys[..., -1] * scales[..., None]
        else:
            scores = np.zeros((*top.shape, BLOCK_SIZE), np.float32)
            for lane in range(queries.shape[-1]):
                scores = fma(queries[..., lane, None], keys[..., lane], scores)
        scores = softcapped(scores, softcap)
        slots = np.arange(BLOCK_SIZE)
        seen = ((slots >= begins[:, None]) & (slots < counts[:, None]))[:, None, None]
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
            own = seeing(begins, counts, slot, slot + 1)
            out[own] = fma(weights[own, ..., slot, None], values[..., slot, :-1], out[own])

    def fold(self, rows: slice, later: Softmax) -> None:
        """Add the positions of `later`, which has the rows `rows`."""
        top, sums, out = self.top[rows], self.sums[rows], self.out[rows]
        higher = np.maximum(top, later.top)
        ours, theirs = exp(top - higher)[..., None], exp(later.top - higher)[..., None]
        sums[...] = fma(later.sums, theirs, sums * ours)
        out[...] = fma(later.out, theirs, out * ours)
        top[...] = higher
