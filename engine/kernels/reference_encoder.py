"""The encoder's arithmetic in numpy: what every native build is tested against, bit for bit.

A batch is its texts one after another. Each token's row is its embedding, its type's and its position's, normed; per
layer attention over the whole text and a feed-forward, each added onto the row and normed after that (post-norm). The
rows of a text then become one vector.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.config import BLOCK_SIZE
from engine.kernels.batch import Float32, TextBatch, Weights
from engine.kernels.layout import LANES, from_bf16, to_bf16
from engine.kernels.reference import Activations, FloatMatrix, Matrix, attend, kernel_matrix
from engine.kernels.reference_math import fma, gelu, gelu_tanh, silu, softcapped, sum_lanes
from engine.kernels.validate import check_texts, check_weights
from engine.models.spec import EncoderSpec

ACTIVATIONS: dict[str, Callable[[Float32], Float32]] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}


class ReferenceEncoder:
    """The `EncoderProgram` that computes in numpy; `activations` as for `ReferenceProgram`.

    "float32" leaves keys and values unrounded too.
    """

    isa = "reference"

    def __init__(
        self, spec: EncoderSpec, weights: Weights, *, max_tokens: int, activations: Activations = "int8"
    ) -> None:
        check_weights(spec, weights)
        self.spec = spec
        self.max_tokens = max_tokens
        self._rounded = activations == "int8"
        make = kernel_matrix if activations == "int8" else FloatMatrix
        self._matrices: dict[str, Matrix] = {
            name: make(tensor) for name, tensor in weights.items() if tensor.format is not None
        }
        self._vectors = {name: np.asarray(t.data, np.float32) for name, t in weights.items() if t.format is None}
        self._batch: TextBatch | None = None
        self._x = np.empty((0, spec.hidden_size), np.float32)
        self._next_layer = 0

    def begin(self, batch: TextBatch) -> None:
        """See `EncoderProgram.begin`."""
        check_texts(self.spec, batch, self.max_tokens)
        self._batch, self._next_layer = batch, 0
        positions = np.arange(len(batch.token_ids)) - np.repeat(batch.starts[:-1], np.diff(batch.starts))
        x = self._matrices["embed"].rows(batch.token_ids) + self._matrices["types"].rows(batch.types)
        self._x = self._normed("embed_norm", x + self._matrices["positions"].rows(positions.astype(np.int32)))

    def run(self, layers: int) -> bool:
        """See `EncoderProgram.run`."""
        assert self._batch is not None and layers >= 1
        for _ in range(min(layers, self.spec.num_layers - self._next_layer)):
            self._layer(f"layers.{self._next_layer}.", self._batch)
            self._next_layer += 1
        if self._next_layer < self.spec.num_layers:
            return False
        self._answer(self._batch)
        self._batch = None
        return True

    def close(self) -> None:
        """See `EncoderProgram.close`."""

    def _layer(self, layer: str, batch: TextBatch) -> None:
        attended = self._attention(self._projected(layer + "qkv", self._x), batch)
        x = self._normed(layer + "attn_norm", self._x + self._projected(layer + "o", attended))
        made = ACTIVATIONS[self.spec.activation](self._projected(layer + "up", x))
        self._x = self._normed(layer + "ffn_norm", x + self._projected(layer + "down", made))

    def _projected(self, name: str, x: Float32) -> Float32:
        projected: Float32 = self._matrices[name].project(x) + self._vectors[name + "_bias"]
        return projected

    def _normed(self, name: str, x: Float32) -> Float32:
        return layer_norm(x, self._vectors[name], self._vectors[name + "_bias"], self.spec.norm_eps)

    def _attention(self, qkv: Float32, batch: TextBatch) -> Float32:
        """Each token over all of its text; qkv [T, 3 * hidden] -> [T, hidden]."""
        heads = qkv.reshape(len(qkv), 3, self.spec.num_heads, self.spec.head_dim)
        queries = heads[:, 0] * np.float32(self.spec.query_scale())
        stored = from_bf16(to_bf16(heads[:, 1:])) if self._rounded else heads[:, 1:]
        attended = np.empty_like(queries)
        for begin, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
            length = int(end - begin)
            num_blocks = -(-length // BLOCK_SIZE)
            # As `attend` wants them: [block, 2, head, slot, lanes and their factor, 1].
            padded = np.zeros((num_blocks * BLOCK_SIZE, *stored.shape[1:3], stored.shape[3] + 1), np.float32)
            padded[:length, ..., :-1] = stored[begin:end]
            padded[..., -1] = 1
            context = padded.reshape(num_blocks, BLOCK_SIZE, *padded.shape[1:]).transpose(0, 2, 3, 1, 4)
            seen = np.full(length, length)
            attended[begin:end] = attend(queries[begin:end], context, np.zeros_like(seen), seen)
        return attended.reshape(len(qkv), -1)

    def _answer(self, batch: TextBatch) -> None:
        spec = self.spec
        for n, (begin, end) in enumerate(zip(batch.starts[:-1], batch.starts[1:], strict=True)):
            pooled = self._x[begin]
            if spec.pooling == "mean" and not spec.num_labels:
                for row in self._x[begin + 1 : end]:  # in this order
                    pooled = pooled + row
                pooled = pooled / np.float32(end - begin)
            if spec.num_labels:
                dense = softcapped(self._projected("pooler", pooled[None]), 1.0)  # tanh
                pooled = self._projected("classifier", dense)[0]
            elif spec.normalize:
                lanes = np.zeros(LANES, np.float32)
                for part in pooled.reshape(-1, LANES):
                    lanes = fma(part, part, lanes)
                pooled = pooled / np.maximum(np.sqrt(sum_lanes(lanes)), np.float32(1e-12))
            batch.out[n] = pooled


def layer_norm(x: Float32, weight: Float32, bias: Float32, eps: float) -> Float32:
    """Vectors [..., n] less their mean, scaled to a variance of 1, then lanes by weight and bias (Ba et al., 2016)."""
    size = np.float32(x.shape[-1])
    total = np.zeros((*x.shape[:-1], LANES), np.float32)
    squares = np.zeros_like(total)
    parts = np.split(x, x.shape[-1] // LANES, axis=-1)
    for part in parts:
        total = total + part
    mean = (sum_lanes(total) / size)[..., None]
    for part in parts:
        squares = fma(part - mean, part - mean, squares)
    scale = np.float32(1) / np.sqrt(sum_lanes(squares)[..., None] / size + np.float32(eps))
    return fma((x - mean) * scale, weight, bias)
