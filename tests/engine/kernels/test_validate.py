"""What a step is refused for: every array, out of shape, type and range, and nothing that is fine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import available_isas
from engine.kernels.batch import StepBatch
from engine.kernels.layout import Correction, PackedTensor
from engine.kernels.native import NativeProgram
from engine.kernels.validate import check_batch, check_copies, check_weights
from tests.engine.kernels.steps import Piece, make_batch, random_matrix, random_weights, sampling_arrays, tiny_spec

SPEC = tiny_spec(max_position=100)
NUM_BLOCKS = 8
PREVIOUS_ROWS = 2
ROWS = 3

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def good_batch() -> StepBatch:
    """Two requests: 36 tokens from position 4 on, and a deferred token at position 99; three sampled rows."""
    sampling = sampling_arrays(
        ROWS,
        temperature=1.0,
        history=[([1, 2], [3]), ([], []), ([4], [5, 300])],
        bias=[{0: 1.0}, {}, {300: -np.inf, 7: -100.0}],
        again=np.array([1, 0, 1], np.int32),
    )
    tokens = [*range(34), -1, 300]
    batch = make_batch(
        [Piece(tokens, 4, [0, 7]), Piece([-2], 99, [3, 4, 5, 6])], SPEC, rows=[0, 35, 36], sampling=sampling
    )
    batch.adapters = np.full(37, -1, np.int32)
    return batch


@functools.cache
def native_programs() -> list[NativeProgram]:
    weights = random_weights(SPEC)
    return [NativeProgram(SPEC, weights, num_blocks=NUM_BLOCKS, threads=1, isa=isa) for isa in available_isas()]


def step_natively(program: NativeProgram, batch: StepBatch) -> None:
    """Compute the batch after a step that chose PREVIOUS_ROWS tokens."""
    piece = Piece([1] * PREVIOUS_ROWS, 0, [0])
    program.step(make_batch([piece], SPEC, sampling=sampling_arrays(PREVIOUS_ROWS)))
    program.step(batch)


def check(batch: StepBatch) -> None:
    """What every build checks for itself, and refuses with the same words."""
    try:
        check_batch(SPEC, batch, NUM_BLOCKS, PREVIOUS_ROWS)
    except ValueError as error:
        for program in native_programs():
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                step_natively(program, batch)
        raise
    for program in native_programs():
        step_natively(program, batch)


def test_a_good_batch_passes() -> None:
    check(good_batch())
    plain = good_batch()
    plain.sampling = plain.logits = plain.hidden = plain.adapters = None
    check(plain)
    without_rows = good_batch()
    without_rows.logits_rows = np.empty(0, np.int32)
    without_rows.logits, without_rows.hidden = np.empty((0, 301), np.float32), np.empty((0, 96), np.float32)
    without_rows.sampling = sampling_arrays(0)
    check(without_rows)


STEP_ARRAYS = ["token_ids", "positions", "query_starts", "seq_lens", "block_tables", "logits_rows", "logits", "hidden"]
ROW_ARRAYS = [
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "choice", "position", "history_starts", "history_output_starts", "history_tokens"),
    *("bias_starts", "bias_tokens", "bias_values", "again"),
]


def change(batch: StepBatch, name: str, damage: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put what `damage` makes of an array of a batch, or of its sampling, in its place."""
    if name in ROW_ARRAYS:
        assert batch.sampling is not None
        batch.sampling = dataclasses.replace(batch.sampling, **{name: damage(getattr(batch.sampling, name))})
    else:
        setattr(batch, name, damage(getattr(batch, name)))


def other_type(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float64 if a.dtype.kind == "f" else np.int64)


def strided(a: np.ndarray) -> np.ndarray:
    return np.repeat(a, 2, axis=-1)[..., ::2]


def extra_axis(a: np.ndarray) -> np.ndarray:
    return a[..., None]


@pytest.mark.parametrize("damage", [other_type, strided, extra_axis])
@pytest.mark.parametrize("name", [*STEP_ARRAYS, "adapters", *ROW_ARRAYS])
def test_types_shapes_and_layouts_are_checked(name: str, damage: Callable[[np.ndarray], np.ndarray]) -> None:
    batch = good_batch()
    change(batch, name, damage)
    with pytest.raises(ValueError, match=f"{name}: expected "):
        check(batch)


@pytest.mark.parametrize("name", ["logits", "hidden", *ROW_ARRAYS])
def test_lengths_are_checked(name: str) -> None:
    batch = good_batch()
    change(batch, name, lambda array: array[:-1].copy())
    with pytest.raises(ValueError, match="expected"):
        check(batch)


def test_outputs_must_be_writeable() -> None:
    for name in ("logits", "hidden"):
        batch = good_batch()
        getattr(batch, name).flags.writeable = False
        with pytest.raises(ValueError, match=f"{name}: expected a writeable array"):
            check(batch)


@pytest.mark.parametrize("value", [-3, 301, INT32_MIN, INT32_MAX])
def test_token_ids_are_in_the_vocabulary_or_deferred(value: int) -> None:
    batch = good_batch()
    batch.token_ids[5] = value
    with pytest.raises(ValueError, match=rf"token_ids: expected values in \[-2, 301\), got \[{value}\]"):
        check(batch)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("query_starts", 0, 1, "query_starts: expected to rise from 0 to 37"),
        ("query_starts", 2, 36, "query_starts: expected to rise from 0 to 37"),
        ("query_starts", 1, 37, "query_starts: expected to rise from 0 to 37"),
        ("query_starts", 1, INT32_MIN, "query_starts: expected to rise from 0 to 37"),
        ("query_starts", 1, INT32_MAX, "query_starts: expected to rise from 0 to 37"),
        ("query_starts", 1, 35, "positions: expected consecutive"),
        ("seq_lens", 0, 35, r"seq_lens: expected from the request's own tokens \[36, 1\] to max_position 100, got"),
        ("seq_lens", 1, 101, "seq_lens: expected from the request's own tokens"),
        ("seq_lens", 0, 41, "positions: .* 5 for token 0, got 4"),
        ("positions", 36, 98, "positions: .* 99 for token 36, got 98"),
        ("positions", 3, INT32_MAX, "positions: .* 7 for token 3"),
        ("logits_rows", 0, -1, r"logits_rows: expected ascending indices in \[0, 37\), got \[-1, 35, 36\]"),
        ("logits_rows", 2, 37, "logits_rows: expected ascending indices"),
        ("logits_rows", 1, 36, "logits_rows: expected ascending indices"),
        ("adapters", 4, 0, r"adapters: expected values in \[-1, 0\), got \[0\]"),
    ],
)
def test_indices_of_a_step_are_checked(name: str, index: int, value: int, message: str) -> None:
    batch = good_batch()
    getattr(batch, name)[index] = value
    with pytest.raises(ValueError, match=message):
        check(batch)


@pytest.mark.parametrize("value", [-1, NUM_BLOCKS, INT32_MIN, INT32_MAX])
def test_blocks_within_a_sequence_are_checked_and_those_past_it_are_not(value: int) -> None:
    batch = good_batch()
    batch.block_tables[0, 0, 2] = value  # 40 tokens fill two blocks
    check(batch)
    batch.block_tables[0, 0, 1] = value
    with pytest.raises(ValueError, match=rf"expected blocks in \[0, 8\), got {value} at entry 1 of request 0"):
        check(batch)


def test_block_tables_must_reach_the_end_of_every_sequence() -> None:
    batch = good_batch()
    batch.block_tables = batch.block_tables[:, :, :3].copy()
    with pytest.raises(ValueError, match="block_tables: expected room for 4 blocks a request, got 3"):
        check(batch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, np.nan, np.inf)),
        *(("top_p", value) for value in (0.0, -1.0, 1.1, np.nan)),
        *(("min_p", value) for value in (-0.1, 1.1, np.nan)),
        *(("repetition_penalty", value) for value in (0.0, -1.0, np.nan, np.inf)),
        *((name, v) for name in ("presence_penalty", "frequency_penalty") for v in (np.nan, np.inf, -np.inf)),
        ("position", -1),
    ],
)
def test_sampling_parameters_are_checked(name: str, value: float) -> None:
    batch = good_batch()
    getattr(batch.sampling, name)[1] = value
    with pytest.raises(ValueError, match=rf"sampling of row 1: .* {name} {value}"):
        check(batch)


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("history_starts", 0, 1, r"history_starts: expected to rise from 0 to 6"),
        ("history_starts", 1, 4, r"history_starts: expected to rise from 0 to 6"),
        ("history_starts", 3, 5, r"history_starts: expected to rise from 0 to 6"),
        ("history_starts", 1, INT32_MIN, r"history_starts: expected to rise from 0 to 6"),
        ("history_output_starts", 0, 4, "history_output_starts: expected within each row's history"),
        ("history_output_starts", 2, 2, "history_output_starts: expected within each row's history"),
        ("history_tokens", 2, 301, r"history_tokens: expected values in \[0, 301\), got \[301\]"),
        ("history_tokens", 2, -1, r"history_tokens: expected values in \[0, 301\), got \[-1\]"),
        ("bias_starts", 2, 0, r"bias_starts: expected to rise from 0 to 3"),
        ("bias_tokens", 0, INT32_MIN, r"bias_tokens: expected values in \[0, 301\)"),
        ("bias_values", 0, np.nan, "bias_values: expected finite values or -inf"),
        ("bias_values", 1, np.inf, "bias_values: expected finite values or -inf"),
    ],
)
def test_indices_of_sampling_are_checked(name: str, index: int, value: float, message: str) -> None:
    batch = good_batch()
    getattr(batch.sampling, name)[index] = value
    with pytest.raises(ValueError, match=message):
        check(batch)


EDGES = [-(2**31), -3, -2, -1, 0, 1, 2, 3, 7, 8, 31, 32, 35, 36, 37, 99, 100, 101, 300, 301, 2**31 - 1]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(STEP_ARRAYS[:6] + ROW_ARRAYS), st.integers(0, 2**20), st.sampled_from([*EDGES, np.nan]))
def test_builds_refuse_just_what_the_checks_in_python_refuse(name: str, where: int, value: float) -> None:
    batch = good_batch()
    array = getattr(batch if name in STEP_ARRAYS else batch.sampling, name)
    if np.isnan(value) and array.dtype != np.float32:
        return
    array.flat[where % array.size] = value % 2**32 if array.dtype.kind == "u" else value
    with contextlib.suppress(ValueError):
        check(batch)  # which compares the two


def test_a_step_has_a_token() -> None:
    batch = good_batch()
    batch.token_ids = batch.positions = np.empty(0, np.int32)
    with pytest.raises(ValueError, match="at least 1 token and 1 request, got 0 and 2"):
        check(batch)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, NUM_BLOCKS]], r"pairs: expected values in \[0, 8\), got \[8\]"),
        ([[-1, 0]], r"pairs: expected values in \[0, 8\), got \[-1\]"),
        ([[0, 2], [1, 2]], "each target once"),
        ([[0, 1], [1, 2]], "as no pair's source"),
    ],
)
def test_block_copies_are_checked(pairs: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_copies(np.array(pairs, np.int32), NUM_BLOCKS)
    with pytest.raises(ValueError, match=r"pairs: expected int32 \[1, 2\], got int32 \[1, 3\]"):
        check_copies(np.zeros((1, 3), np.int32), NUM_BLOCKS)
    check_copies(np.array([[0, 1], [0, 2]], np.int32), NUM_BLOCKS)
    check_copies(np.empty((0, 2), np.int32), NUM_BLOCKS)


def test_weights_are_checked() -> None:
    rng = np.random.default_rng(0)
    good = random_weights(SPEC)
    check_weights(SPEC, good)
    matrix = good["layers.0.o"]
    cases: list[tuple[str, object, str]] = [
        ("layers.0.o", None, r"missing \['layers.0.o'\]"),
        ("head", matrix, r"got also \['head'\]"),
        ("layers.0.o", matrix.data, "expected a PackedTensor, got ndarray"),
        ("layers.0.o", random_matrix(rng, 96, 128, 4, Correction.MIN), r"expected shape \[96, 96\], got \[96, 128\]"),
        ("layers.0.o", PackedTensor(matrix.format, matrix.data[:-1]), r"expected uint8 \[7680\], got uint8 \[7679\]"),
        ("final_norm", random_matrix(rng, 96, 96, 4, Correction.MIN), r"expected shape \[96\], got \[96, 96\]"),
        ("final_norm", PackedTensor(None, np.ones(95, np.float32)), r"expected float32 \[96\], got float32 \[95\]"),
        ("layers.0.o", PackedTensor(None, np.ones(96, np.float32)), r"expected float32 \[96, 96\], got float32 \[96\]"),
    ]
    for name, tensor, message in cases:
        changed: dict[str, Any] = {key: value for key, value in good.items() if key != name}
        if tensor is not None:
            changed[name] = tensor
        with pytest.raises(ValueError, match=message):
            check_weights(SPEC, changed)
