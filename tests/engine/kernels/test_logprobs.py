"""Log-probabilities of rows: every build against the numpy twin, and the twin against a softmax written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import available_isas
from engine.kernels.batch import Float32, Int32, LogprobArrays
from engine.kernels.native import build, native_logprobs
from engine.kernels.reference import ReferenceProgram
from engine.kernels.reference_sampler import write_logprobs
from engine.kernels.selftest import UNFUSED, logprob_arrays, sampling_arrays
from tests.engine.kernels.conftest import ProgramFactory
from tests.engine.kernels.steps import Piece, make_batch, random_weights, tiny_spec


def twin(logits: Float32, targets: Int32, most: int) -> LogprobArrays:
    wanted = logprob_arrays(targets, most)
    write_logprobs(logits, targets, wanted)
    return wanted


def native(isa: str, logits: Float32, targets: Int32, most: int) -> LogprobArrays:
    module = build(isa)
    assert module is not None
    wanted = logprob_arrays(targets, most)
    module.logprobs(logits, native_logprobs(module, wanted))
    return wanted


def assert_equal(isa: str, got: LogprobArrays, expected: LogprobArrays) -> None:
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.ranks, expected.ranks)
    if isa in UNFUSED:
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)
    else:
        np.testing.assert_array_equal(got.logprobs, expected.logprobs)


@settings(deadline=None, max_examples=60)
@given(
    data=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 2, 15, 16, 17, 300, 1000, 1024, 1100, 5000]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    most=st.sampled_from([0, 1, 5, 20]),
    broken=st.booleans(),
)
def test_every_build_gives_the_twins_bits(data: int, vocab: int, spread: float, most: int, broken: bool) -> None:
    rng = np.random.default_rng(data)
    # Rounding to quarters makes ties, which go to the lower id.
    logits = (np.round(rng.normal(size=(12, vocab)) * spread * 4) / 4).astype(np.float32)
    if broken:
        for value in (-np.inf, np.inf, np.nan):
            logits[rng.random(logits.shape) < 0.1] = value
        logits[0] = np.nan
    targets = rng.integers(-1, vocab, len(logits)).astype(np.int32)
    expected = twin(logits, targets, most)
    for isa in available_isas():
        assert_equal(isa, native(isa, logits, targets, most), expected)


def test_the_twin_is_a_log_softmax() -> None:
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(9, 3001)) * 5).astype(np.float32)
    targets = rng.integers(0, 3001, 9).astype(np.int32)
    got = twin(logits, targets, 7)
    wide = logits.astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)[:, :7]
    np.testing.assert_array_equal(got.tokens, np.column_stack([targets, order]))
    np.testing.assert_allclose(got.logprobs, np.take_along_axis(logprobs, got.tokens.astype(np.int64), 1), atol=2e-6)
    own = np.take_along_axis(logprobs, targets[:, None].astype(np.int64), 1)
    np.testing.assert_array_equal(got.ranks, 1 + (logprobs > own).sum(axis=1))


def test_a_row_that_wants_nothing_is_left_alone(isa: str) -> None:
    logits = np.zeros((2, 40), np.float32)
    wanted = dataclasses.replace(logprob_arrays(np.array([3, 4], np.int32), 2), counts=np.array([-1, 1], np.int32))
    wanted.tokens[...] = 77
    module = build(isa)
    assert module is not None
    module.logprobs(logits, native_logprobs(module, wanted))
    assert wanted.tokens.tolist() == [[77, 77, 77], [4, 0, -1]]
    assert wanted.ranks.tolist()[1] == 5  # of equals the lower ids come first


def test_rows_of_a_step(program_factory: ProgramFactory, isa: str) -> None:
    """Chosen and given tokens in one step: the twin's results, whatever the caller does with logits."""
    spec = tiny_spec()
    weights = random_weights(spec)
    piece = Piece(np.random.default_rng(0).integers(0, spec.vocab_size, 40).tolist(), 0, [1, 0])
    rows = [0, 5, 6, 38, 39]
    how = sampling_arrays(len(rows), spec.vocab_size, temperature=0.7, top_k=0, top_p=0.9, min_p=0.0)
    how.temperature[3:] = 0
    results: list[tuple[Int32, LogprobArrays]] = []
    for program in (
        ReferenceProgram(spec, weights, num_blocks=2),
        *(program_factory(spec, weights, num_blocks=2),) * 2,
    ):
        batch = make_batch([piece], spec, rows=rows, sampling=how)
        batch.logprobs = dataclasses.replace(
            logprob_arrays(np.array([9, -1, 300, -1, -1], np.int32), 4), counts=np.array([4, 2, 0, -1, 4], np.int32)
        )
        batch.logprobs.tokens[...] = -1
        if len(results) == 2:
            batch.logits = batch.hidden = None  # then rows that want nothing keep nothing but their best
        chosen = program.step(batch)
        assert chosen[0] == 9 and chosen[2] == 300
        assert batch.logprobs.tokens[[0, 1, 2, 4], 0].tolist() == chosen[[0, 1, 2, 4]].tolist()
        results.append((chosen, batch.logprobs))
    (expected_tokens, expected), *natives = results
    for chosen, got in natives:
        assert (got.logprobs == natives[0][1].logprobs).all()
        if isa not in UNFUSED:
            np.testing.assert_array_equal(chosen, expected_tokens)
            assert_equal(isa, got, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.array([0, 3], np.int32)}, r"logprob counts: expected values in \[-1, 3\), got \[3\]"),
        ({"counts": np.array([0], np.int32)}, "logprob counts: expected int32"),
        ({"targets": np.array([0, 301], np.int32)}, r"logprob targets: expected values in \[-1, 301\), got \[301\]"),
        ({"tokens": np.zeros((2, 0), np.int32)}, "logprob tokens: expected"),
        ({"logprobs": np.zeros((2, 4), np.float32)}, "logprobs: expected float32"),
        ({"ranks": np.zeros(3, np.int32)}, "logprob ranks: expected int32"),
        ({"ranks": np.zeros(2, np.int64)}, "logprob ranks: expected int32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    program_factory: ProgramFactory, changes: dict[str, Any], message: str
) -> None:
    spec = tiny_spec()
    weights = random_weights(spec)
    how = sampling_arrays(2, spec.vocab_size, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    for program in (ReferenceProgram(spec, weights, num_blocks=1), program_factory(spec, weights, num_blocks=1)):
        batch = make_batch([Piece([1, 2, 3], 0, [0])], spec, rows=[0, 2], sampling=how)
        batch.logprobs = dataclasses.replace(logprob_arrays(np.array([-1, -1], np.int32), 2), **changes)
        with pytest.raises(ValueError, match=message):
            program.step(batch)
        batch.logprobs = logprob_arrays(np.array([-1, -1], np.int32), 2)
        batch.sampling = None
        with pytest.raises(ValueError, match="logprobs: expected sampling beside them, got none"):
            program.step(batch)
