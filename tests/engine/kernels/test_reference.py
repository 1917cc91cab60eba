"""The twin itself: its pieces against definitions, its steps against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from engine.config import BLOCK_SIZE
from engine.kernels.batch import Float32
from engine.kernels.layout import GROUP, Correction, PackedTensor, dequantize, unpack_matrix
from engine.kernels.reference import (
    SEGMENT,
    FloatMatrix,
    QuantizedMatrix,
    ReferenceProgram,
    attend,
    gated,
    kernel_matrix,
    quantize_activations,
    rms_norm,
    rope_tables,
    rotate,
)
from engine.models.spec import RopeSpec
from tests.engine.kernels.steps import (
    BF16,
    FORMATS,
    Piece,
    cosines,
    exact_fma,
    logits_of,
    make_batch,
    random_matrix,
    random_weights,
    sampling_arrays,
    sequence_logits,
    tiny_spec,
)

QUANTS = [fmt for fmt in FORMATS if fmt != BF16]
SPEC = tiny_spec()
NUM_BLOCKS = 16


def program(**options: object) -> ReferenceProgram:
    return ReferenceProgram(SPEC, random_weights(SPEC), num_blocks=NUM_BLOCKS, **options)  # type: ignore[arg-type]


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, SPEC.vocab_size, count)]


# Pieces of the arithmetic


@given(npst.arrays(np.float32, (2, 2 * GROUP), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_activations_are_rounded_to_the_nearest_of_255_levels(x: Float32) -> None:
    quants, scales, sums = quantize_activations(x)
    assert quants.shape == (2, 2, GROUP)
    assert (quants == np.rint(quants)).all()
    assert (np.abs(quants) <= 127).all()
    assert (sums == quants.astype(np.int64).sum(axis=-1)).all()
    error = np.abs(quants.astype(np.float64) * scales[:, :, None] - x.reshape(quants.shape))
    # Half a level, and what float32 rounds of the scale; below 1e-36 there are no levels.
    assert (error <= 0.5001 * scales[:, :, None] + 1e-36).all()


def test_a_group_without_magnitude_becomes_zeros() -> None:
    x = np.zeros((1, 2 * GROUP), np.float32)
    x[0, GROUP:] = 1e-44  # 127 / amax overflows
    quants, scales, sums = quantize_activations(x)
    assert not quants.any()
    assert not sums.any()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize(("bits", "correction"), QUANTS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 64), (65, 96), (33, 576)])
def test_a_projection_is_the_sum_of_its_groups_in_order(n: int, k: int, bits: int, correction: Correction) -> None:
    rng = np.random.default_rng(n + k)
    tensor = random_matrix(rng, n, k, bits, correction)
    x = rng.standard_normal((3, k)).astype(np.float32)
    out = QuantizedMatrix(tensor).project(x)

    assert tensor.format is not None
    weights, weight_scales, mins = unpack_matrix(tensor.format, tensor.data.view(np.uint8))
    quants, scales, _ = quantize_activations(x)
    for m in range(3):
        for row in range(n):
            total = np.float32(0)
            for g in range(k // GROUP):
                q_w = weights[row, g * GROUP : (g + 1) * GROUP].astype(int)
                q_x = quants[m, g].astype(int)
                dot = int(q_w @ q_x) - (0 if mins is not None else tensor.format.zero_point * int(q_x.sum()))
                total = exact_fma(np.float32(weight_scales[row, g]) * np.float32(dot), scales[m, g], total)
                if mins is not None:
                    total = exact_fma(np.float32(mins[row, g]), scales[m, g] * np.float32(q_x.sum()), total)
            assert out[m, row] == total


@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 64), (65, 96)])
def test_a_bf16_projection_adds_the_sums_of_its_groups(n: int, k: int) -> None:
    rng = np.random.default_rng(n + k)
    tensor = random_matrix(rng, n, k, *BF16)
    x = rng.standard_normal((2, k)).astype(np.float32)
    out = kernel_matrix(tensor).project(x)
    assert tensor.format is not None
    weights = dequantize(tensor.format, tensor.data.view(np.uint8))
    for m in range(2):
        for row in range(n):
            total = np.float32(0)
            for first in range(0, k, GROUP):
                group = np.float32(0)
                for i in range(first, first + GROUP):
                    group = exact_fma(weights[row, i], x[m, i], group)
                total += group
            assert out[m, row] == total


@pytest.mark.parametrize(("bits", "correction"), FORMATS)
def test_a_projection_approximates_the_dequantized_product(bits: int, correction: Correction) -> None:
    rng = np.random.default_rng(1)
    tensor = random_matrix(rng, 50, 576, bits, correction)
    x = rng.standard_normal((4, 576)).astype(np.float32)
    assert tensor.format is not None
    exact = x.astype(np.float64) @ dequantize(tensor.format, tensor.data.view(np.uint8)).T.astype(np.float64)
    np.testing.assert_allclose(FloatMatrix(tensor).project(x), exact, atol=1e-4)
    assert cosines(kernel_matrix(tensor).project(x), exact).min() > 0.9999


@pytest.mark.parametrize(("bits", "correction"), FORMATS)
def test_a_row_alone_is_the_row_inside_any_batch(bits: int, correction: Correction) -> None:
    rng = np.random.default_rng(2)
    matrix = kernel_matrix(random_matrix(rng, 77, 160, bits, correction))
    x = rng.standard_normal((33, 160)).astype(np.float32)
    whole = matrix.project(x)
    for count in (1, 2, 7, 32):
        assert (matrix.project(x[:count]) == whole[:count]).all()
        assert (matrix.project(x[-count:]) == whole[-count:]).all()


@pytest.mark.parametrize(("bits", "correction"), FORMATS)
def test_embedding_rows_are_the_dequantized_ones(bits: int, correction: Correction) -> None:
    tensor = random_matrix(np.random.default_rng(3), 70, 96, bits, correction)
    assert tensor.format is not None
    expected = dequantize(tensor.format, tensor.data.view(np.uint8))
    ids = np.array([69, 0, 5, 5, 64], np.int32)
    assert (kernel_matrix(tensor).rows(ids) == expected[ids]).all()
    assert (FloatMatrix(tensor).rows(ids) == expected[ids]).all()


@pytest.mark.parametrize("dim", [16, 64])
def test_rope_turns_pairs_as_complex_numbers(dim: int) -> None:
    rng = np.random.default_rng(4)
    positions = np.array([0, 1, 7, 8191], np.int32)
    heads = rng.standard_normal((4, 3, dim)).astype(np.float32)
    cos, sin = rope_tables(positions, RopeSpec(theta=100000.0, dim=dim))
    turned = rotate(heads, cos, sin)
    pairs = heads[..., : dim // 2] + 1j * heads[..., dim // 2 :]
    for t, position in enumerate(positions):
        for i in range(dim // 2):
            expected = pairs[t, :, i] * np.exp(1j * float(position) * 100000.0 ** (-2 * i / dim))
            np.testing.assert_allclose(turned[t, :, i], expected.real, atol=1e-6)
            np.testing.assert_allclose(turned[t, :, i + dim // 2], expected.imag, atol=1e-6)
    assert (turned[0] == heads[0]).all()


def test_gate_and_up_columns_alternate_in_groups_of_32() -> None:
    gate = np.linspace(-200, 200, 96, dtype=np.float32)[None]  # exp(200) overflows float32
    up = np.arange(1, 97, dtype=np.float32)[None]
    interleaved = np.concatenate([part[:, i : i + 32] for i in (0, 32, 64) for part in (gate, up)], axis=1)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(gated(interleaved, "silu"), wide / (1 + np.exp(-wide)) * up, rtol=1e-6, atol=1e-30)


@given(npst.arrays(np.float32, (2, 96), elements=st.floats(-1024, 1024, width=32)))
def test_rms_norm_scales_to_the_weights(x: Float32) -> None:
    weight = np.linspace(0.5, 2, 96, dtype=np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("length", [1, 31, 33, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 0.0), (SEGMENT + 3, 2.0)])
def test_attention_is_a_softmax_over_what_a_row_sees(
    length: int, causal: bool, quantized: bool, window: int, softcap: float
) -> None:
    rng = np.random.default_rng(length)
    rows = min(length, 5)
    num_blocks = -(-length // BLOCK_SIZE)
    queries = rng.standard_normal((rows, 4, 16)).astype(np.float32)
    context = rng.standard_normal((num_blocks, 2, 2, BLOCK_SIZE, 16 + 1)).astype(np.float32)
    if quantized:
        context[..., :-1] = np.clip(np.rint(context[..., :-1] * 40), -127, 127)
        context[..., -1] = rng.uniform(1 / 80, 1 / 20, context.shape[:-1])
    else:
        context[..., -1] = 1
    after = np.arange(length - rows + 1, length + 1)
    limits = after if causal else np.full(rows, length)
    lows = np.maximum(after - window, 0) if window else np.zeros(rows, int)
    out = attend(queries, context, lows, limits, softcap=softcap, quantized=quantized)

    keys, values = (
        (context[..., :-1].astype(np.float64) * context[..., -1:]).transpose(1, 2, 0, 3, 4).reshape(2, 2, -1, 16)
    )  # [KV head, position, lane]
    for i in range(rows):
        for head in range(4):
            seen = slice(lows[i], limits[i])
            scores = keys[head // 2, seen] @ queries[i, head]
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            expected = weights @ values[head // 2, seen] / weights.sum()
            # 16-bit quants: a score of size 16 is off by about 16 / 2**16 at most, and so is its weight's logarithm.
            np.testing.assert_allclose(out[i, head], expected, atol=1e-3 if quantized else 1e-5)


# Whole steps


@pytest.mark.parametrize("chunk", [1, 7, 32, 50])
def test_chunks_give_the_bits_of_the_whole(chunk: int) -> None:
    ids = random_ids(70)
    whole = sequence_logits(program(), SPEC, ids)
    assert (sequence_logits(program(), SPEC, ids, chunk) == whole).all()


def test_where_blocks_lie_changes_no_bit() -> None:
    ids = random_ids(70)
    whole = sequence_logits(program(), SPEC, ids)
    batch = make_batch([Piece(ids, 0, [9, 2, 15])], SPEC)
    program().step(batch)
    assert (logits_of(batch) == whole).all()


def test_other_requests_change_no_bit() -> None:
    sequences = [random_ids(count, seed) for seed, count in enumerate((1, 33, 64, 40))]
    alone = [sequence_logits(program(), SPEC, ids) for ids in sequences]
    together = program()
    blocks = [[3], [0, 7], [5, 1], [8, 2]]
    # The third request's first 50 tokens come in a step of their own, and the last is prefilled beside the others.
    together.step(make_batch([Piece(sequences[2][:50], 0, blocks[2])], SPEC))
    starts = [0, 0, 50, 0]
    pieces = [Piece(ids[start:], start, table) for ids, start, table in zip(sequences, starts, blocks, strict=True)]
    batch = make_batch(pieces, SPEC)
    together.step(batch)
    for q, (expected, start) in enumerate(zip(alone, starts, strict=True)):
        begin, end = batch.query_starts[q : q + 2]
        assert (logits_of(batch)[begin:end] == expected[start:]).all()


def test_a_copied_block_is_a_shared_prefix() -> None:
    ids = random_ids(64)
    expected = sequence_logits(program(), SPEC, ids)[40:]
    subject = program()
    subject.step(make_batch([Piece(ids[:40], 0, [0, 1])], SPEC))
    subject.copy_blocks(np.array([[1, 4], [0, 9]], np.int32))
    subject.step(make_batch([Piece(random_ids(64, seed=9), 0, [0, 1])], SPEC))  # the copies are copies
    batch = make_batch([Piece(ids[40:], 40, [9, 4])], SPEC)
    subject.step(batch)
    assert (logits_of(batch) == expected).all()


def test_deferred_tokens_are_those_of_the_previous_step() -> None:
    first, second = random_ids(5, 1), random_ids(9, 2)
    subject = program()
    pieces = [Piece(first, 0, [0]), Piece(second, 0, [1])]
    chosen = subject.step(make_batch(pieces, SPEC, rows=[4, 13], sampling=sampling_arrays(2)))
    assert chosen.dtype == np.int32
    # The rows have changed places since: row 1 of the last step is the first request of this one.
    deferred = make_batch([Piece([-2], 9, [1]), Piece([-1], 5, [0])], SPEC)
    subject.step(deferred)

    other = program()
    other.step(make_batch(pieces, SPEC))
    explicit = make_batch([Piece([int(chosen[1])], 9, [1]), Piece([int(chosen[0])], 5, [0])], SPEC)
    other.step(explicit)
    assert (logits_of(deferred) == logits_of(explicit)).all()


def test_nothing_is_deferred_to_a_step_that_chose_nothing() -> None:
    subject = program()
    subject.step(make_batch([Piece([1], 0, [0])], SPEC, sampling=sampling_arrays(1)))
    subject.step(make_batch([Piece([2], 1, [0])], SPEC))
    with pytest.raises(ValueError, match=r"token_ids: expected values in \[0, 301\), got \[-1\]"):
        subject.step(make_batch([Piece([-1], 2, [0])], SPEC))


def test_a_deferred_token_that_could_not_be_chosen_reads_as_token_0() -> None:
    forbidden = sampling_arrays(1, bias=[dict.fromkeys(range(SPEC.vocab_size), -np.inf)])
    subject, other = program(), program()
    assert subject.step(make_batch([Piece([1], 0, [0])], SPEC, sampling=forbidden)).tolist() == [-1]
    other.step(make_batch([Piece([1], 0, [0])], SPEC))
    deferred, explicit = make_batch([Piece([-1], 1, [0])], SPEC), make_batch([Piece([0], 1, [0])], SPEC)
    subject.step(deferred)
    other.step(explicit)
    assert (logits_of(deferred) == logits_of(explicit)).all()


def test_without_causality_every_token_sees_the_whole_request() -> None:
    spec = tiny_spec(num_layers=1)
    weights = random_weights(spec)
    ids = random_ids(40)
    outputs = []
    for order in (ids, [*reversed(ids[:-1]), ids[-1]]):
        batch = make_batch([Piece(order, 0, [0, 1])], spec, causal=False)
        ReferenceProgram(spec, weights, num_blocks=2, activations="float32").step(batch)
        outputs.append(logits_of(batch))
    causal = make_batch([Piece(ids, 0, [0, 1])], spec)
    ReferenceProgram(spec, weights, num_blocks=2, activations="float32").step(causal)
    # The last token sees everything either way; the first one only without causality.
    np.testing.assert_allclose(outputs[0][-1], logits_of(causal)[-1], atol=1e-4)
    assert np.abs(outputs[0][0] - logits_of(causal)[0]).max() > 0.01
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01  # positions still count


def test_hidden_states_and_chosen_rows_agree_with_the_logits() -> None:
    spec = tiny_spec(tie_embeddings=False)
    weights = random_weights(spec)
    ids = random_ids(20)
    full = make_batch([Piece(ids, 0, [0])], spec)
    ReferenceProgram(spec, weights, num_blocks=1).step(full)
    some = make_batch([Piece(ids, 0, [0])], spec, rows=[3, 19])
    some.logits = None
    ReferenceProgram(spec, weights, num_blocks=1).step(some)
    assert full.hidden is not None
    assert some.hidden is not None
    assert (some.hidden == full.hidden[[3, 19]]).all()
    assert (QuantizedMatrix(weights["head"]).project(full.hidden) == logits_of(full)).all()


def test_float32_activations_and_cache_only_round_less() -> None:
    ids = random_ids(60)
    exact = sequence_logits(program(activations="float32", kv_dtype="float32"), SPEC, ids)
    rounded_cache = sequence_logits(program(activations="float32"), SPEC, ids)
    quantized_cache = sequence_logits(program(activations="float32", kv_dtype="int8"), SPEC, ids)
    quantized = sequence_logits(program(), SPEC, ids)
    assert 0.9999 < cosines(rounded_cache, exact).mean() < 1
    assert 0.9999 < cosines(quantized_cache, exact).mean() < 1
    assert 0.999 < cosines(quantized, exact).mean() < cosines(rounded_cache, exact).mean()


def test_a_refused_step_writes_nothing() -> None:
    subject = program()
    ids = random_ids(40)
    subject.step(make_batch([Piece(ids, 0, [0, 1])], SPEC, rows=[39], sampling=sampling_arrays(1)))
    wrong = make_batch([Piece(random_ids(40, 1), 0, [0, 1]), Piece([SPEC.vocab_size], 0, [2])], SPEC)
    with pytest.raises(ValueError, match="token_ids"):
        subject.step(wrong)
    assert np.isnan(logits_of(wrong)).all()
    with pytest.raises(ValueError, match="pairs"):
        subject.copy_blocks(np.array([[3, 0], [3, NUM_BLOCKS]], np.int32))
    # The keys, the values and the token chosen before are as they were.
    batch, untouched = make_batch([Piece([-1], 40, [0, 1])], SPEC), program()
    subject.step(batch)
    untouched.step(make_batch([Piece(ids, 0, [0, 1])], SPEC, rows=[39], sampling=sampling_arrays(1)))
    expected = make_batch([Piece([-1], 40, [0, 1])], SPEC)
    untouched.step(expected)
    assert (logits_of(batch) == logits_of(expected)).all()


def test_a_closed_program_computes_no_more() -> None:
    subject = program()
    subject.close()
    subject.close()
    with pytest.raises(RuntimeError, match="closed"):
        subject.step(make_batch([Piece([1], 0, [0])], SPEC))
    with pytest.raises(RuntimeError, match="closed"):
        subject.copy_blocks(np.zeros((0, 2), np.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks: expected at least 1, got 0"),
        ({"num_blocks": 1, "activations": "int4"}, "activations int8 or float32 .* got int4"),
        ({"num_blocks": 1, "kv_dtype": "int4"}, "kv_dtype bf16, int8 or float32, got int8 and int4"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceProgram(SPEC, random_weights(SPEC), **options)  # type: ignore[arg-type]


def test_weights_must_fit_the_spec() -> None:
    weights: dict[str, PackedTensor] = random_weights(SPEC)
    weights["layers.1.o"] = random_matrix(np.random.default_rng(0), 96, 64, 4, Correction.MIN)
    with pytest.raises(ValueError, match=r"weights\['layers.1.o'\]: expected shape \[96, 96\], got \[96, 64\]"):
        ReferenceProgram(SPEC, weights, num_blocks=1)
