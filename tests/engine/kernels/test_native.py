"""Every native build against the numpy twin, and against itself: a row's bits depend on nothing but the row."""

from __future__ import annotations

import dataclasses
import functools
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import KV_DTYPES
from engine.errors import ConfigError
from engine.kernels import available_isas, create_program, select_isa
from engine.kernels.batch import Float32, Int32, LogprobArrays, Program, SamplingArrays, UInt32
from engine.kernels.layout import Correction, PackedTensor, pack_bf16, to_bf16
from engine.kernels.native import ROPE_PIECE, NativeProgram, RopeTables, build, native_matrix, native_sampling
from engine.kernels.reference import QuantizedMatrix, ReferenceProgram, kernel_matrix, rope_tables
from engine.kernels.reference_sampler import sample, uniform
from engine.models.spec import DecoderSpec, RopeSpec
from tests.engine.kernels.steps import (
    BF16,
    FORMATS,
    INT4,
    INT8,
    Format,
    Piece,
    cosines,
    logits_of,
    make_batch,
    mask_of,
    random_matrix,
    random_weights,
    sampling_arrays,
    sequence_logits,
    tiny_spec,
)

ISAS = available_isas()

# What the matrices of a program may be stored as: one format for all, or several mixed.
MIXES: dict[str, tuple[Format, Mapping[str, Format]]] = {
    "4-bit": (INT4, {}),
    "8-bit": (INT8, {}),
    "bf16": (BF16, {}),
    "bf16 embedding": (INT4, {"embed": BF16}),
    "bf16 qkv and down, 8-bit o": (INT4, {"qkv": BF16, "down": BF16, "o": INT8}),
    "bf16 o and gate_up": (INT8, {"o": BF16, "gate_up": BF16}),
    "layers apart": (
        INT4,
        {"layers.0.qkv": BF16, "layers.1.o": BF16, "layers.0.gate_up": INT8, "layers.1.down": BF16, "head": BF16},
    ),
    "4-bit head": (BF16, {"head": INT4}),
}
# Twelve query heads over one KV head fill one pass of the attention; 18 need two.
SPECS = {
    "grouped": tiny_spec(max_position=2048),
    "one query head a KV head": tiny_spec(num_heads=4, num_kv_heads=4, head_dim=32, hidden_size=128, vocab_size=64),
    "many heads share a KV head": tiny_spec(num_heads=18, num_kv_heads=1, head_dim=16, tie_embeddings=False),
    "wide heads": tiny_spec(num_heads=2, num_kv_heads=1, head_dim=80, intermediate_size=32),
    "heads of 96": tiny_spec(num_heads=4, num_kv_heads=2, head_dim=96, num_layers=1),
    "32 heads of 128 on 8": tiny_spec(num_heads=32, num_kv_heads=8, head_dim=128, num_layers=1),
    # What families have beside Llama's form.
    "sliding": tiny_spec(windows=(40, 40), max_position=2048),
    "one layer of two slides far": tiny_spec(windows=(700, 0), max_position=2048),
    "biases": tiny_spec(qkv_bias=True),
    "normed heads": tiny_spec(qk_norm=True, head_dim=48, num_heads=2, num_kv_heads=1),
    "norms after, caps, every other layer sliding": tiny_spec(
        post_norms=True,
        activation="gelu_tanh",
        embedding_scale=96**0.5,
        attention_scale=0.3,
        attention_softcap=2.0,
        final_softcap=3.0,
        windows=(33, 0),
        tie_embeddings=False,
    ),
    "norms after, local rope": tiny_spec(
        post_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        embedding_scale=96**0.5,
        windows=(20, 20, 0),
        num_layers=3,
        num_kv_heads=1,
        rope=RopeSpec(theta=1e6, dim=16, factors=(8.0,) * 8),
        local_rope=RopeSpec(theta=10000.0, dim=16),
        max_position=2048,
    ),
    "experts": tiny_spec(num_experts=5, experts_per_token=2, intermediate_size=64),
    "experts weighed beside all, norms after": tiny_spec(
        num_experts=9,
        experts_per_token=3,
        normalize_experts=False,
        post_norms=True,
        intermediate_size=32,
    ),
    "partly turned, long": tiny_spec(
        head_dim=32,
        num_heads=3,
        num_kv_heads=3,
        attention_scale=0.2,
        rope=RopeSpec(
            theta=10000.0,
            dim=24,
            factors=(1.0,) * 12,
            long_factors=(1.0, 1.5) * 6,
            original_context=64,
            attention_factor=1.19,
        ),
    ),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def program(isa: str) -> Iterator[Program]:
    made = make_program(SPECS["grouped"], isa)
    yield made
    made.close()


def make_program(
    spec: DecoderSpec, isa: str, *, threads: int = 2, mix: str = "4-bit", num_blocks: int = 80, kv_dtype: str = "bf16"
) -> Program:
    fmt, formats = MIXES[mix]
    weights = random_weights(spec, fmt, formats=formats)
    return create_program(spec, weights, num_blocks=num_blocks, threads=threads, isa=isa, kv_dtype=kv_dtype)


def matmul(isa: str, tensor: PackedTensor, x: Float32, rows: int) -> Float32:
    module = build(isa)
    assert module is not None and tensor.format is not None
    y = np.empty((len(x), tensor.format.n), np.float32)
    module.matmul(native_matrix(tensor), x, rows, y)
    return y


def ids(count: int, spec: DecoderSpec, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, spec.vocab_size, count)]


def assert_the_twins(isa: str, actual: Float32, expected: Float32) -> None:
    """The twin's bits, but for the portable build, which has no fused multiply-adds."""
    if isa == "portable":
        assert cosines(actual, expected).mean() >= 0.9999
    else:
        np.testing.assert_array_equal(actual, expected)


def test_this_machine_runs_a_native_build() -> None:
    assert ISAS and ISAS[-1] == "portable"
    assert select_isa("portable") == "portable"
    with pytest.raises(ConfigError, match="neon"):
        select_isa("neon")


# Projections


@pytest.mark.parametrize(("bits", "correction"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 96), (33, 64), (65, 576), (200, 160), (307, 96)])
def test_a_projection_is_the_twins(isa: str, n: int, k: int, bits: int, correction: Correction) -> None:
    rng = np.random.default_rng(n)
    tensor = random_matrix(rng, n, k, bits, correction)
    x = rng.normal(size=(65, k)).astype(np.float32)
    expected = kernel_matrix(tensor).project(x)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 65):
        y = matmul(isa, tensor, x[:count], 8)
        if isa == "portable":
            np.testing.assert_allclose(y, expected[:count], rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        else:
            np.testing.assert_array_equal(y, expected[:count])


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-36, 1e18, 1e38])
def test_bf16_products_of_any_size_are_the_twins(isa: str, size: float) -> None:
    """Zeros of both signs, subnormal inputs, weights and sums, and sums that overflow."""
    rng = np.random.default_rng(3)
    weights = (rng.normal(size=(70, 96)) * 10.0 ** rng.integers(-4, 2, (70, 96))).astype(np.float32)
    weights[rng.random(weights.shape) < 0.1] = -0.0
    weights[rng.random(weights.shape) < 0.1] = 1e-39  # as bfloat16 a subnormal too
    tensor = PackedTensor(*pack_bf16(to_bf16(weights)))
    x = (rng.normal(size=(5, 96)) * size).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = kernel_matrix(tensor).project(x)
    y = matmul(isa, tensor, x, 5)
    assert np.isfinite(expected).all() == (size < 1e38)
    if isa == "portable":
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(y), finite)
        np.testing.assert_allclose(y[finite], expected[finite], rtol=1e-4, atol=1e-5 * size + 96 * 2.0**-149)
    else:
        np.testing.assert_array_equal(y, expected)


def test_a_bf16_projection_rounds_no_activation(isa: str) -> None:
    """A matrix with one 1 in each row picks inputs, to the bit."""
    rng = np.random.default_rng(4)
    picked = rng.integers(0, 64, 100)
    tensor = PackedTensor(*pack_bf16(to_bf16(np.eye(64, dtype=np.float32)[picked])))
    x = rng.normal(size=(9, 64)).astype(np.float32)
    np.testing.assert_array_equal(matmul(isa, tensor, x, 8), x[:, picked])


@pytest.mark.parametrize(("bits", "correction"), FORMATS)
def test_a_row_alone_is_the_row_inside_any_number_of_rows(isa: str, bits: int, correction: Correction) -> None:
    rng = np.random.default_rng(1)
    tensor = random_matrix(rng, 130, 96, bits, correction)
    x = rng.normal(size=(17, 96)).astype(np.float32)
    alone = matmul(isa, tensor, x, 1)
    for rows in range(2, 9):
        np.testing.assert_array_equal(matmul(isa, tensor, x, rows), alone)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_quants_and_activations_do_not_saturate(isa: str, bits: int) -> None:
    rng = np.random.default_rng(2)
    tensor = random_matrix(rng, 64, 64, bits, Correction.MIN)
    tensor.data.reshape(2, -1)[:, : 64 * 32 * bits // 8] = 0xFF
    x = np.where(rng.random((4, 64)) < 0.9, 5.0, -5.0).astype(np.float32)
    np.testing.assert_allclose(matmul(isa, tensor, x, 4), QuantizedMatrix(tensor).project(x), rtol=1e-5, atol=1e-3)


def test_vector_builds_agree_to_the_bit() -> None:
    """AVX2 and AVX-512 do the same operations in the same order; only the portable build has no fused ones."""
    fused = [isa for isa in ISAS if isa != "portable"]
    spec = SPECS["grouped"]
    logits = [sequence_logits(make_program(spec, isa), spec, ids(70, spec)) for isa in fused]
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


# The whole step


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("mix", "kv_dtype"), [("4-bit", "bf16"), ("8-bit", "bf16"), ("bf16", "bf16"), ("bf16", "int8")]
)
def test_logits_are_the_twins(isa: str, name: str, mix: str, kv_dtype: str) -> None:
    spec = SPECS[name]
    tokens = ids(75, spec)
    native = sequence_logits(make_program(spec, isa, mix=mix, kv_dtype=kv_dtype), spec, tokens)
    assert_the_twins(isa, native, twin_logits(name, mix, kv_dtype))


@pytest.mark.parametrize("mix", MIXES)
def test_matrices_of_several_formats_make_one_program(isa: str, mix: str) -> None:
    """In steps of one, three and many tokens, for which threads share the preparation of inputs differently."""
    name = "many heads share a KV head"  # the head is a matrix of its own
    spec = SPECS[name]
    tokens = ids(75, spec)
    expected = twin_logits(name, mix)
    for chunk, threads in ((75, 2), (40, 1), (8, 3), (3, 2), (1, 2), (1, 16)):
        native = sequence_logits(make_program(spec, isa, mix=mix, threads=threads), spec, tokens, chunk)
        assert_the_twins(isa, native, expected)


@functools.cache
def twin_logits(name: str, mix: str, kv_dtype: str = "bf16") -> Float32:
    """Of 75 tokens, computed once for all builds."""
    spec = SPECS[name]
    fmt, formats = MIXES[mix]
    twin = ReferenceProgram(spec, random_weights(spec, fmt, formats=formats), num_blocks=4, kv_dtype=kv_dtype)
    return sequence_logits(twin, spec, ids(75, spec))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [0, 40, 530])
def test_a_context_of_two_segments_is_the_twins(isa: str, kv_dtype: str, window: int) -> None:
    """Past 512 positions a second softmax is folded into the first, of which a window leaves nothing or a part."""
    spec = tiny_spec(num_layers=1, max_position=2048, windows=(window,))
    tokens = ids(550, spec)
    weights = random_weights(spec)
    native = create_program(spec, weights, num_blocks=18, threads=2, isa=isa, kv_dtype=kv_dtype)
    twin = ReferenceProgram(spec, weights, num_blocks=18, kv_dtype=kv_dtype)
    expected = sequence_logits(twin, spec, tokens)
    assert_the_twins(isa, sequence_logits(native, spec, tokens), expected)
    native.close()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunk", [1, 3, 32, 50])
@pytest.mark.parametrize(("mix", "kv_dtype"), [("4-bit", "bf16"), ("bf16", "bf16"), ("4-bit", "int8")])
def test_chunks_give_the_bits_of_the_whole(isa: str, name: str, chunk: int, mix: str, kv_dtype: str) -> None:
    spec = SPECS[name]
    tokens = ids(101, spec)
    whole, chunked = (make_program(spec, isa, mix=mix, kv_dtype=kv_dtype) for _ in range(2))
    np.testing.assert_array_equal(sequence_logits(chunked, spec, tokens, chunk), sequence_logits(whole, spec, tokens))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("name", "mix", "kv_dtype"),
    [
        ("grouped", "4-bit", "bf16"),
        ("grouped", "bf16", "int8"),
        ("many heads share a KV head", "bf16", "bf16"),
        ("many heads share a KV head", "bf16", "int8"),
        ("sliding", "4-bit", "bf16"),
        ("one layer of two slides far", "4-bit", "bf16"),
        ("one layer of two slides far", "4-bit", "int8"),
        ("norms after, local rope", "4-bit", "bf16"),
    ],
)
def test_long_contexts_split_over_threads_give_the_same_bits(
    isa: str, threads: int, name: str, mix: str, kv_dtype: str
) -> None:
    """Past 512 positions a lone token's context is split over the threads; a chunk's is not."""
    spec = dataclasses.replace(SPECS[name], max_position=2048)
    tokens = ids(1100, spec)
    whole = sequence_logits(make_program(spec, isa, threads=1, mix=mix, kv_dtype=kv_dtype), spec, tokens, chunk=400)
    program = make_program(spec, isa, threads=threads, mix=mix, kv_dtype=kv_dtype)
    blocks = range(35)
    sequence_logits(program, spec, tokens[:1020], chunk=255)
    for position in range(1020, 1030):
        batch = make_batch([Piece([tokens[position]], position, blocks)], spec)
        program.step(batch)
        np.testing.assert_array_equal(logits_of(batch)[0], whole[position])


@pytest.mark.parametrize(
    "name", ["grouped", "norms after, caps, every other layer sliding", "partly turned, long", "experts"]
)
def test_a_crowd_and_scattered_blocks_change_no_bit(isa: str, name: str) -> None:
    spec = SPECS[name]
    program = make_program(spec, isa)
    sequences = [ids(length, spec, seed) for seed, length in enumerate((1, 40, 7, 64, 33, 90, 2, 31, 5, 12))]
    alone = [sequence_logits(make_program(spec, isa), spec, tokens) for tokens in sequences]
    order = np.random.default_rng(3).permutation(80).tolist()
    pieces = [Piece(tokens, 0, order[4 * i : 4 * i + 4]) for i, tokens in enumerate(sequences)]
    batch = make_batch(pieces, spec)
    program.step(batch)
    np.testing.assert_array_equal(logits_of(batch), np.concatenate(alone))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_a_block_held_before_does_not_matter(isa: str, kv_dtype: str) -> None:
    spec = SPECS["grouped"]
    program, fresh = (make_program(spec, isa, kv_dtype=kv_dtype) for _ in range(2))
    sequence_logits(program, spec, ids(96, spec, 5))
    again = sequence_logits(program, spec, ids(40, spec, 6), chunk=9)
    np.testing.assert_array_equal(again, sequence_logits(fresh, spec, ids(40, spec, 6)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_copied_block_is_a_shared_prefix(isa: str, kv_dtype: str) -> None:
    spec = SPECS["grouped"]
    program = make_program(spec, isa, kv_dtype=kv_dtype)
    tokens = ids(50, spec)
    expected = sequence_logits(program, spec, tokens)
    program.copy_blocks(np.array([[0, 7]], np.int32))
    batch = make_batch([Piece(tokens[32:], 32, [7, 9])], spec)
    program.step(batch)
    np.testing.assert_array_equal(logits_of(batch), expected[32:])


def test_without_causality_every_token_sees_the_whole_request(isa: str, program: Program) -> None:
    spec = SPECS["grouped"]
    pieces = [Piece(ids(45, spec, 1), 0, [0, 1]), Piece(ids(20, spec, 2), 0, [2])]
    expected, batch = make_batch(pieces, spec, causal=False), make_batch(pieces, spec, causal=False)
    ReferenceProgram(spec, random_weights(spec), num_blocks=4).step(expected)
    program.step(batch)
    assert_the_twins(isa, logits_of(batch), logits_of(expected))


def test_deferred_tokens_are_those_of_the_previous_step(isa: str, program: Program) -> None:
    spec = SPECS["grouped"]
    pieces = [Piece(ids(9, spec, 1), 0, [0]), Piece(ids(4, spec, 2), 0, [1])]
    first = make_batch(pieces, spec, rows=[8, 12], sampling=greedy(2))
    chosen = program.step(first)
    np.testing.assert_array_equal(chosen, logits_of(first).argmax(axis=1))
    deferred = make_batch([Piece([-2], 4, [1]), Piece([-1], 9, [0])], spec, sampling=greedy(2))
    program.step(deferred)
    named = make_batch([Piece([int(chosen[1])], 4, [1]), Piece([int(chosen[0])], 9, [0])], spec, sampling=greedy(2))
    program.step(named)
    np.testing.assert_array_equal(logits_of(deferred), logits_of(named))


@pytest.mark.parametrize("name", SPECS)
def test_a_greedy_choice_needs_no_logits(isa: str, name: str) -> None:
    spec = SPECS[name]
    program = make_program(spec, isa)
    pieces = [Piece(ids(9, spec, r), 0, [r]) for r in range(4)]
    histories = [[], [1, 2], [], []]  # the second row's logits are adjusted first
    how = sampling(4, temperature=0.0, history=histories, penalties=(1.5, 0.0, 0.0))
    shown = make_batch(pieces, spec, rows=[8, 17, 26, 35], sampling=how)
    np.testing.assert_array_equal(program.step(dataclasses.replace(shown, logits=None)), program.step(shown))
    program.close()


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_of_equal_logits_the_first_is_chosen_and_of_none_none(isa: str, value: float) -> None:
    spec = SPECS["grouped"]
    weights = random_weights(spec)
    weights["final_norm"].data[:] = value
    program = NativeProgram(spec, weights, num_blocks=4, isa=isa, threads=2)
    batch = make_batch([Piece(ids(9, spec), 0, [0])], spec, rows=[8], sampling=greedy(1))
    unseen = dataclasses.replace(batch, logits=None, hidden=None)
    assert program.step(unseen).tolist() == program.step(batch).tolist() == [0 if value == 0 else -1]
    program.close()


def test_hidden_states_are_the_twins(isa: str, program: Program) -> None:
    spec = SPECS["grouped"]
    expected, batch = (make_batch([Piece(ids(30, spec), 0, [3])], spec, rows=[3, 29]) for _ in range(2))
    ReferenceProgram(spec, random_weights(spec), num_blocks=4).step(expected)
    program.step(batch)
    assert batch.hidden is not None and expected.hidden is not None
    assert_the_twins(isa, batch.hidden, expected.hidden)


def test_more_threads_than_cores_neither_hang_nor_change_a_bit(isa: str) -> None:
    spec = SPECS["grouped"]
    tokens = ids(64, spec)
    expected = sequence_logits(make_program(spec, isa, threads=1), spec, tokens, chunk=2)
    crowd = make_program(spec, isa, threads=16)
    for _ in range(3):
        np.testing.assert_array_equal(sequence_logits(crowd, spec, tokens, chunk=2), expected)
    crowd.close()


def test_a_profile_accounts_for_the_time_of_the_steps_it_saw(isa: str) -> None:
    spec = SPECS["grouped"]
    program = make_program(spec, isa)
    assert isinstance(program, NativeProgram)
    batch = make_batch([Piece(ids(30, spec), 0, [3])], spec, rows=[29], sampling=greedy(1))
    program.step(batch)
    assert set(program.phase_seconds().values()) == {0.0}
    program.profile(True)
    start = time.perf_counter()
    program.step(batch)
    seconds = time.perf_counter() - start
    seen = program.phase_seconds()
    assert list(seen)[:3] == ["prepare", "embed", "attn_norm"]
    assert all(seen[name] > 0 for name in ("prepare", "qkv", "attend", "out", "gate_up", "down", "head", "sample"))
    assert sum(seen.values()) <= seconds
    program.profile(False)
    program.step(batch)
    assert set(program.phase_seconds().values()) == {0.0}
    program.close()


def test_a_closed_program_computes_no_more(isa: str) -> None:
    spec = SPECS["grouped"]
    program = make_program(spec, isa)
    program.close()
    program.close()
    with pytest.raises(RuntimeError, match="closed"):
        program.step(make_batch([Piece([1], 0, [0])], spec))


def test_a_wrong_step_is_refused_before_anything_is_written(isa: str, program: Program) -> None:
    spec = SPECS["grouped"]
    batch = make_batch([Piece([spec.vocab_size], 0, [0])], spec)
    with pytest.raises(ValueError, match="token_ids"):
        program.step(batch)
    assert np.isnan(logits_of(batch)).all()


def test_rotations_are_computed_as_far_as_sequences_reach() -> None:
    rope = RopeSpec(theta=500000.0, dim=32, factors=tuple(1.0 + i for i in range(16)))
    tables = RopeTables(rope, 3 * ROPE_PIECE - 100)
    for longest, ready in ((1, 1), (ROPE_PIECE, 1), (ROPE_PIECE + 1, 2), (2, 2)):
        tables.reach(longest)
        assert tables.num_ready == ready * ROPE_PIECE
    tables.reach(3 * ROPE_PIECE - 100)
    cos, sin = rope_tables(np.arange(3 * ROPE_PIECE - 100, dtype=np.int32), rope)
    np.testing.assert_array_equal(tables.cos, cos[:, 0])
    np.testing.assert_array_equal(tables.sin, sin[:, 0])


def test_a_context_of_a_million_positions_costs_what_is_used_of_it(isa: str) -> None:
    """Each table would take 256 MB. A step far into the context rotates as the twin does."""
    spec = tiny_spec(num_layers=1, head_dim=128, max_position=1 << 20)
    weights = random_weights(spec)

    def resident_megabytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before = resident_megabytes()
    native = create_program(spec, weights, num_blocks=100, threads=1, isa=isa)
    # Nothing was written to the blocks before: both see keys and values of 0 there.
    batch, expected = (make_batch([Piece(ids(3, spec), 3100, range(97))], spec) for _ in range(2))
    native.step(batch)
    assert resident_megabytes() - before < 50
    ReferenceProgram(spec, weights, num_blocks=100).step(expected)
    assert_the_twins(isa, logits_of(batch), logits_of(expected))


# The sampler


def sampling(
    rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0),
    history: Sequence[Sequence[int]] | None = None,
    output: Sequence[int] | None = None,
    bias: dict[int, float] | None = None,
    seed: int = 7,
) -> SamplingArrays:
    """Rows that are alike but for their position and history; `output` counts each history's last tokens."""
    histories = history or [[]] * rows
    starts = np.cumsum([0, *map(len, histories)]).astype(np.int32)
    bias = bias or {}

    def floats(value: float) -> Float32:
        return np.full(rows, value, np.float32)

    def ints(value: int) -> Int32:
        return np.full(rows, value, np.int32)

    return SamplingArrays(
        temperature=floats(temperature),
        top_k=ints(top_k),
        top_p=floats(top_p),
        min_p=floats(min_p),
        repetition_penalty=floats(penalties[0]),
        presence_penalty=floats(penalties[1]),
        frequency_penalty=floats(penalties[2]),
        seed=np.full(rows, seed, np.uint64),
        choice=ints(3),
        position=np.arange(rows, dtype=np.int32),
        history_starts=starts,
        history_output_starts=starts[1:] - np.array(output or [0] * rows, np.int32),
        history_tokens=np.array([token for one in histories for token in one], np.int32),
        bias_starts=np.arange(rows + 1, dtype=np.int32) * len(bias),
        bias_tokens=np.array(list(bias) * rows, np.int32),
        bias_values=np.array(list(bias.values()) * rows, np.float32),
    )


def greedy(rows: int) -> SamplingArrays:
    return sampling(rows, temperature=0.0)


def native_sample(isa: str, logits: Float32, how: SamplingArrays, masks: UInt32 | None = None) -> Int32:
    module = build(isa)
    assert module is not None
    chosen = np.empty(len(logits), np.int32)
    module.sample(logits, native_sampling(module, how), chosen, masks)
    return chosen


@given(
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 2**31 - 1),
    position=st.integers(0, 2**31 - 1),
    again=st.integers(0, 1),
)
def test_the_generator_is_the_twins(seed: int, choice: int, position: int, again: int) -> None:
    for isa in ISAS:
        module = build(isa)
        assert module is not None
        assert module.uniform(seed, choice, position, again) == uniform(seed, choice, position, again)


@settings(deadline=None, max_examples=60)
@given(
    data=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 2, 15, 16, 17, 300, 1000]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    temperature=st.sampled_from([0.0, 1e-3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    penalized=st.booleans(),
    masked=st.booleans(),
)
def test_tokens_are_the_twins(
    data: int,
    vocab: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalized: bool,
    masked: bool,
) -> None:
    rows = 24
    rng = np.random.default_rng(data)
    # Rounding to quarters makes ties, which go to the lower id.
    logits = (np.round(rng.normal(size=(rows, vocab)) * spread * 4) / 4).astype(np.float32)
    logits[rng.random(logits.shape) < 0.05] = -np.inf
    history = [rng.integers(0, vocab, 30).tolist() for _ in range(rows)] if penalized else None
    how = sampling(
        rows,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        penalties=(1.3, 0.5, 0.25) if penalized else (1.0, 0.0, 0.0),
        history=history,
        output=[int(n) for n in rng.integers(0, 31, rows)] if penalized else None,
        bias={0: -1.5, vocab - 1: -np.inf} if penalized and vocab > 2 else None,
        seed=data,
    )
    masks = rng.integers(0, 2**32, (rows, (vocab + 31) // 32), np.uint32) if masked else None
    expected = sample(logits, how, masks)
    for isa in ISAS:
        chosen = native_sample(isa, logits, how, masks)
        # A draw or a limit within rounding of a boundary may fall on either side of it; both sides are rare.
        assert np.mean(chosen != expected) <= 1 / rows, (isa, chosen, expected)


def test_a_mask_decides_what_is_allowed(isa: str) -> None:
    logits = np.random.default_rng(4).normal(size=(5, 70)).astype(np.float32)
    allowed = [3, 31, 32, 69]
    masks = np.tile(mask_of(allowed, 70), (5, 1))
    expected = np.array(allowed)[logits[:, allowed].argmax(axis=1)]
    np.testing.assert_array_equal(native_sample(isa, logits, greedy(5), masks), expected)
    np.testing.assert_array_equal(native_sample(isa, logits, greedy(5), np.zeros_like(masks)), -1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_rows_are_chosen_again_as_the_twin_does(
    isa: str, temperature: float, with_logits: bool, num_threads: int
) -> None:
    spec = tiny_spec()
    weights = random_weights(spec)
    arrays = sampling_arrays(3, temperature=temperature, seed=11, again=np.array([1, 0, 1], np.int32))
    tokens: list[list[int]] = []
    scores: list[LogprobArrays] = []
    programs: list[Program] = [
        NativeProgram(spec, weights, num_blocks=4, threads=num_threads, isa=isa),
        ReferenceProgram(spec, weights, num_blocks=4),
    ]
    for program in programs:
        batch = make_batch([Piece([1, 2, 3, 4], 0, [0])], spec, rows=[1, 2, 3], sampling=arrays)
        if not with_logits:
            batch.logits = None
        batch.logprobs = wanted = LogprobArrays(
            counts=np.array([1, 1, 1], np.int32),
            targets=np.full(3, -1, np.int32),
            tokens=np.zeros((3, 2), np.int32),
            logprobs=np.zeros((3, 2), np.float32),
            ranks=np.zeros(3, np.int32),
        )
        first = program.step(batch).tolist()
        untouched = wanted.tokens[1].copy()
        others = [t for t in range(spec.vocab_size) if t not in first]
        again = [program.choose_again(row, mask_of(others[row::3], spec.vocab_size)) for row in (2, 0)]
        assert {*again} <= {*others} and wanted.tokens[[2, 0], 0].tolist() == again
        assert (wanted.tokens[1] == untouched).all()
        assert (wanted.ranks[[0, 2]] > 1).all() or temperature > 0
        assert program.choose_again(0, mask_of([], spec.vocab_size)) == -1
        last = program.choose_again(0, mask_of([7], spec.vocab_size))
        assert last == 7
        deferred = make_batch([Piece([-1], 4, [0])], spec)  # reads row 0, which is token 7 now
        program.step(deferred)
        explicit = make_batch([Piece([7], 4, [0])], spec)
        program.step(explicit)
        assert (logits_of(deferred) == logits_of(explicit)).all()
        tokens.append(first + again)
        scores.append(wanted)
        program.close()
    assert tokens[0] == tokens[1]
    assert (scores[0].tokens == scores[1].tokens).all() and (scores[0].ranks == scores[1].ranks).all()
    np.testing.assert_allclose(scores[0].logprobs, scores[1].logprobs, rtol=0, atol=3e-2 if isa == "portable" else 1e-5)


def test_only_rows_that_were_kept_are_chosen_again(isa: str) -> None:
    spec = tiny_spec()
    mask = mask_of([1], spec.vocab_size)
    program = NativeProgram(spec, random_weights(spec), num_blocks=4, isa=isa)
    with pytest.raises(ValueError, match=r"row: expected one that the last step kept, \[\], got 0"):
        program.choose_again(0, mask)
    arrays = sampling_arrays(2, again=np.array([0, 1], np.int32))
    program.step(make_batch([Piece([1, 2], 0, [0])], spec, rows=[0, 1], sampling=arrays))
    for row in (-1, 0, 2):
        with pytest.raises(ValueError, match=rf"row: expected one that the last step kept, \[1\], got {row}"):
            program.choose_again(row, mask)
    with pytest.raises(ValueError, match="mask: expected"):
        program.choose_again(1, mask[:-1].copy())
    assert program.choose_again(1, mask) == 1
    program.step(make_batch([Piece([1], 2, [0])], spec))  # chooses nothing
    with pytest.raises(ValueError, match="row: expected one that the last step kept"):
        program.choose_again(1, mask)
    program.close()


FAR = np.float32(3e38)


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 3},
        {"top_k": 4096},
        {"top_k": 49_151},
        {"top_p": 0.5},
        {"top_p": 0.999999},
        {"top_k": 600, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "lie",
    [
        "all equal",
        "two values",
        "neighbouring floats",
        "one peak",
        "ends of the range",
        "powers",
        "nearly all forbidden",
    ],
)
def test_selection_ends_and_is_the_twins_however_logits_lie(isa: str, lie: str, how: dict[str, Any]) -> None:
    """Whole vocabularies on which a search for a threshold, by value or by count, would go wrong or on forever."""
    vocab, rng = 49_152, np.random.default_rng(5)
    lies: dict[str, Callable[[], Any]] = {
        "all equal": lambda: np.full(vocab, -2.5),
        "two values": lambda: np.where(rng.random(vocab) < 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2))),
        "neighbouring floats": lambda: np.float32(-7) + rng.integers(0, 5000, vocab) * np.float32(2**-21),
        "one peak": lambda: np.where(np.arange(vocab) == 77, 50.0, rng.normal(size=vocab) * 1e-6),
        "ends of the range": lambda: rng.choice(np.array([-FAR, FAR, 0.0, 1e-45, -1e-45]), vocab),
        "powers": lambda: -np.exp2(rng.integers(-126, 10, vocab).astype(np.float64)),
        "nearly all forbidden": lambda: np.where(rng.random(vocab) < 1e-3, rng.normal(size=vocab), -np.inf),
    }
    logits = np.tile(lies[lie]().astype(np.float32), (12, 1))
    drawn = sampling(12, seed=9, **how)
    chosen, expected = native_sample(isa, logits, drawn), sample(logits, drawn)
    # What a draw means is the token's logit: among 49,152 summed masses, roundings move a draw to a neighbour.
    assert np.mean(logits[0, chosen] != logits[0, expected]) <= 1 / 12
    if "top_k" in how and lie != "all equal" and "top_p" not in how:
        kept = np.argsort(-logits[0], kind="stable")[: how["top_k"]]
        assert set(chosen.tolist()) <= set(kept.tolist())


def test_logits_that_are_not_finite_are_never_chosen(isa: str) -> None:
    logits = np.array([[np.nan, np.inf, -np.inf, -3.0, -4.0], [np.nan, np.inf, -np.inf, -np.inf, np.nan]], np.float32)
    np.testing.assert_array_equal(native_sample(isa, logits, greedy(2)), [3, -1])
    assert set(native_sample(isa, logits, sampling(2)).tolist()) <= {3, 4, -1}


def test_draws_follow_the_distribution(isa: str) -> None:
    """20,000 draws of five tokens: each count within five standard deviations of its expectation."""
    rows = 20_000
    row = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03]))
    logits = np.tile(row.astype(np.float32), (rows, 1))
    counts = np.bincount(native_sample(isa, logits, sampling(rows)), minlength=5)
    p = np.exp(row)
    assert (np.abs(counts - rows * p) <= 5 * np.sqrt(rows * p * (1 - p))).all()
