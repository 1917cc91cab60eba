"""Steps, weights and measures that the kernel tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import BLOCK_SIZE
from engine.kernels.batch import Float32, Int32, Program, SamplingArrays, StepBatch, UInt32
from engine.kernels.layout import GROUP, Correction, PackedTensor, pack_bf16, pack_matrix, to_bf16
from engine.models.spec import DecoderSpec, RopeSpec


def tiny_spec(**changes: Any) -> DecoderSpec:
    """A decoder with awkward sizes; `changes` replaces fields."""
    fields: dict[str, Any] = {
        "family": "test",
        "num_layers": 2,
        "hidden_size": 96,
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 160,
        "vocab_size": 301,
        "max_position": 512,
        "norm_eps": 1e-5,
    }
    fields |= changes
    fields.setdefault("rope", RopeSpec(theta=10000.0, dim=fields["head_dim"]))
    return DecoderSpec(**fields)


Format = tuple[int, Correction]
"""Bits and correction of a matrix."""

INT4, INT8 = (4, Correction.MIN), (8, Correction.ZERO_POINT)
BF16 = (16, Correction.NONE)
FORMATS: tuple[Format, ...] = (
    (4, Correction.ZERO_POINT),
    (4, Correction.MIN),
    (8, Correction.ZERO_POINT),
    (8, Correction.MIN),
    BF16,
)


def random_matrix(rng: np.random.Generator, n: int, k: int, bits: int, correction: Correction) -> PackedTensor:
    """A random packed matrix whose outputs keep the size of its inputs."""
    if correction is Correction.NONE:
        return PackedTensor(*pack_bf16(to_bf16((rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32))))
    levels = 1 << bits
    quants = rng.integers(0, levels, (n, k), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1.5, (n, k // GROUP)) * np.sqrt(12 / k) / levels).astype(np.float16)
    mins = None
    if correction is Correction.MIN:
        mins = (-scales * np.float16(levels / 2) * rng.uniform(0.9, 1.1, scales.shape)).astype(np.float16)
    return PackedTensor(*pack_matrix(quants, scales, mins, bits=bits))


def random_weights(
    spec: DecoderSpec, fmt: Format = INT4, *, formats: Mapping[str, Format] | None = None, seed: int = 0
) -> dict[str, PackedTensor]:
    """Random weights of a spec. `formats` names matrices, or those of all layers ("qkv"), that are not in `fmt`."""
    rng = np.random.default_rng(seed)
    others = dict(formats or {})
    weights = {}
    for name, shape in spec.tensor_shapes().items():
        if len(shape) == 1:
            weights[name] = PackedTensor(None, rng.uniform(0.5, 1.5, shape).astype(np.float32))
        else:
            kind = name.rpartition(".")[2]
            own = BF16 if kind == "router" else others.get(name, others.get(kind, fmt))
            weights[name] = random_matrix(rng, shape[0], shape[1], *own)
    return weights


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one request in one step: the first stands at `start`, and position p lies in blocks[p // 32]."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


def make_batch(
    pieces: Sequence[Piece],
    spec: DecoderSpec,
    *,
    rows: Sequence[int] | None = None,
    sampling: SamplingArrays | None = None,
    causal: bool = True,
) -> StepBatch:
    """A step over `pieces` that gives logits and hidden states of `rows` (None: of every token)."""
    num_tokens = sum(len(piece.token_ids) for piece in pieces)
    chosen = np.arange(num_tokens) if rows is None else np.asarray(rows)
    max_blocks = max(len(piece.blocks) for piece in pieces)
    tables = np.full((1, len(pieces), max_blocks), -7, np.int32)  # what is past a sequence must not be read
    for q, piece in enumerate(pieces):
        tables[0, q, : len(piece.blocks)] = piece.blocks
    return StepBatch(
        token_ids=np.concatenate([piece.token_ids for piece in pieces]).astype(np.int32),
        positions=np.concatenate([np.arange(piece.start, piece.end) for piece in pieces]).astype(np.int32),
        query_starts=np.cumsum([0, *(len(piece.token_ids) for piece in pieces)]).astype(np.int32),
        seq_lens=np.array([piece.end for piece in pieces], np.int32),
        block_tables=tables,
        logits_rows=chosen.astype(np.int32),
        sampling=sampling,
        logits=np.full((len(chosen), spec.vocab_size), np.nan, np.float32),
        hidden=np.full((len(chosen), spec.hidden_size), np.nan, np.float32),
        causal=causal,
    )


def logits_of(batch: StepBatch) -> Float32:
    assert batch.logits is not None
    return batch.logits


def sequence_logits(program: Program, spec: DecoderSpec, token_ids: Sequence[int] | Int32, chunk: int = 256) -> Float32:
    """Logits [len(token_ids), vocab] of one sequence in the program's first blocks, `chunk` tokens a step."""
    blocks = range(-(-len(token_ids) // BLOCK_SIZE))
    parts = []
    for start in range(0, len(token_ids), chunk):
        piece = np.asarray(token_ids[start : start + chunk])
        batch = make_batch([Piece(piece.tolist(), start, blocks)], spec)
        program.step(batch)
        parts.append(logits_of(batch))
    return np.concatenate(parts)


def sampling_arrays(num_rows: int, **changes: Any) -> SamplingArrays:
    """Greedy rows without penalties; `changes` replaces arrays (scalars are repeated for every row).

    `history` and `bias` are lists of rows: (prompt, output) and {token: value}.
    """
    history: list[tuple[list[int], list[int]]] = changes.pop("history", [([], [])] * num_rows)
    bias: list[dict[int, float]] = changes.pop("bias", [{}] * num_rows)
    lengths = [len(prompt) + len(output) for prompt, output in history]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    arrays = SamplingArrays(
        temperature=np.zeros(num_rows, np.float32),
        top_k=np.zeros(num_rows, np.int32),
        top_p=np.ones(num_rows, np.float32),
        min_p=np.zeros(num_rows, np.float32),
        repetition_penalty=np.ones(num_rows, np.float32),
        presence_penalty=np.zeros(num_rows, np.float32),
        frequency_penalty=np.zeros(num_rows, np.float32),
        seed=np.zeros(num_rows, np.uint64),
        choice=np.zeros(num_rows, np.int32),
        position=np.arange(num_rows, dtype=np.int32),
        history_starts=starts,
        history_output_starts=(starts[:-1] + [len(prompt) for prompt, _ in history]).astype(np.int32),
        history_tokens=np.array([t for prompt, output in history for t in [*prompt, *output]], np.int32),
        bias_starts=np.cumsum([0, *(len(row) for row in bias)]).astype(np.int32),
        bias_tokens=np.array([t for row in bias for t in row], np.int32),
        bias_values=np.array([v for row in bias for v in row.values()], np.float32),
    )
    for name, value in changes.items():
        current = getattr(arrays, name)
        if np.isscalar(value) and current is not None:
            value = np.full(current.shape, value, current.dtype)
        arrays = dataclasses.replace(arrays, **{name: value})
    return arrays


def mask_of(allowed: Iterable[int], vocab: int) -> UInt32:
    """A mask, uint32 [ceil(vocab / 32)], that allows these tokens."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of each row of a with that of b."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.sqrt(np.square(a).sum(axis=-1) * np.square(b).sum(axis=-1))
    products: NDArray[np.float64] = (a * b).sum(axis=-1) / norms
    return products


def exact_fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """a * b + c in rational numbers, rounded once to the nearest float32, an even one between two."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    candidates = (near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf)))
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))
