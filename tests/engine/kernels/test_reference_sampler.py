"""The sampler's twin against its definitions (SamplingArrays), written out token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.batch import Float32, SamplingArrays
from engine.kernels.reference_sampler import adjusted_logits, kept_tokens, philox4x32, sample, uniform
from tests.engine.kernels.steps import mask_of, sampling_arrays

NONE_ALLOWED = -1
logit = st.one_of(st.integers(-8, 8).map(float), st.floats(-20, 20, width=32), st.just(-math.inf))
rows = st.lists(logit, min_size=1, max_size=12)


def as_row(values: list[float]) -> Float32:
    return np.array(values, np.float32)


# The generator


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # Random123's known answers for philox4x32, 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x32(counter, key) == words


def test_a_draw_depends_on_every_part_of_its_key() -> None:
    base = {"seed": 2**40 + 3, "choice": 1, "position": 77}
    drawn = {uniform(**base)}
    for changes in ({"seed": 2**40 + 4}, {"seed": 2**41 + 3}, {"choice": 2}, {"position": 78}):
        drawn.add(uniform(**(base | changes)))
    assert len(drawn) == 5


def test_draws_are_multiples_in_the_half_open_unit_interval() -> None:
    draws = np.array([uniform(seed=9, choice=0, position=position) for position in range(4000)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert (draws * 2**24 == np.rint(draws * 2**24)).all()
    # Mean and variance of a uniform variable, within five standard errors.
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(draws))
    assert abs(draws.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(draws))


# What may be drawn


def brute_force(row: Float32, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """The definition of top-k, top-p and min-p, in exact order, one token at a time."""
    allowed = [t for t in range(len(row)) if math.isfinite(row[t])]
    in_order = sorted(allowed, key=lambda t: (-row[t], t))
    if top_k > 0:
        in_order = in_order[:top_k]
    best = float(row[in_order[0]])
    weight = {t: math.exp((float(row[t]) - best) / temperature) for t in in_order}
    if top_p < 1:
        total, kept, mass = sum(weight.values()), [], 0.0
        for t in in_order:
            kept.append(t)
            mass += weight[t]
            if mass >= top_p * total:
                break
        in_order = kept
    return sorted(t for t in in_order if weight[t] >= min_p)


@given(
    values=rows.filter(lambda values: max(values) > -math.inf),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, -1, 1, 2, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9, 0.5003, 0.01]),
    min_p=st.sampled_from([0.0, 0.07, 0.5003, 1.0]),
)
def test_kept_tokens_are_those_of_the_definition(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = as_row(values)
    parameters = np.float32(temperature), top_k, np.float32(top_p), np.float32(min_p)
    kept, weights = kept_tokens(row, *parameters)
    # Where a weight lies within rounding of a limit, either answer is right.
    expected = {tuple(brute_force(row, temperature, top_k, top_p * (1 + e), min_p * (1 + e))) for e in (-1e-5, 0, 1e-5)}
    if top_p == 1 or min_p == 1:
        expected = {tuple(brute_force(row, temperature, top_k, float(parameters[2]), float(parameters[3])))}
    assert tuple(kept.tolist()) in expected
    assert weights.max() == 1
    exact = np.exp((row[kept] - row[kept].max()) / np.float64(temperature))
    np.testing.assert_allclose(weights, exact, rtol=1e-5, atol=math.exp(-87))  # below e**-87 the kernels' own is 0


def test_ties_go_to_the_lower_id() -> None:
    row = as_row([1, 3, 3, 2, 3])
    off = np.float32(1), np.float32(0)
    assert kept_tokens(row, np.float32(1), 2, *off)[0].tolist() == [1, 2]
    assert kept_tokens(row, np.float32(1), 0, np.float32(0.01), np.float32(0))[0].tolist() == [1]
    assert sample(row[None], sampling_arrays(1)).tolist() == [1]


def test_top_p_counts_what_top_k_left() -> None:
    row = np.log(as_row([0.4, 0.3, 0.2, 0.1]))
    # Of all four 0.6 needs two tokens; of the first two alone, whose masses are 4/7 and 3/7, 0.57 needs only one.
    assert kept_tokens(row, np.float32(1), 0, np.float32(0.57), np.float32(0))[0].tolist() == [0, 1]
    assert kept_tokens(row, np.float32(1), 2, np.float32(0.57), np.float32(0))[0].tolist() == [0]


def test_a_tiny_temperature_leaves_the_best_token() -> None:
    row = as_row([0.5, 2.0, 1.999, -4])
    kept, weights = kept_tokens(row, np.float32(1e-38), 0, np.float32(1), np.float32(0))
    assert weights[kept == 1] == 1
    assert weights.sum() == 1
    hot = sampling_arrays(50, temperature=1e-38, position=np.arange(50, dtype=np.int32))
    assert (sample(np.tile(row, (50, 1)), hot) == 1).all()


# What is drawn


@given(values=rows, seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 1000), position=st.integers(0, 100_000))
def test_a_draw_takes_the_token_that_u_falls_on(values: list[float], seed: int, choice: int, position: int) -> None:
    how = sampling_arrays(1, temperature=1.0, choice=choice, position=position)
    how.seed[0] = seed
    [token] = sample(as_row(values)[None], how)
    if max(values) == -math.inf:
        assert token == NONE_ALLOWED
        return
    weights = [math.exp(value - max(values)) for value in as_row(values).astype(float)]
    target, running = uniform(seed, choice, position) * sum(weights), 0.0
    candidates = set()
    for t, weight in enumerate(weights):
        slack = 1e-5 * sum(weights)
        if weight > 0 and running - slack <= target <= running + weight + slack:
            candidates.add(t)
        running += weight
    assert token in candidates


def test_draws_follow_the_distribution() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    count = 5000
    logits = np.tile(np.log(probabilities).astype(np.float32), (count, 1))
    how = sampling_arrays(count, temperature=1.0, seed=11, position=np.arange(count, dtype=np.int32))
    drawn = np.bincount(sample(logits, how), minlength=5)
    assert (np.abs(drawn - count * probabilities) <= 5 * np.sqrt(count * probabilities * (1 - probabilities))).all()


def test_a_row_draws_the_same_in_any_company() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 40)).astype(np.float32)
    settings: dict[str, Any] = {
        "temperature": np.linspace(0.2, 1.2, 6, dtype=np.float32),
        "seed": np.arange(6, dtype=np.uint64),
    }
    together = sample(logits, sampling_arrays(6, **settings))
    for r in range(6):
        alone = sampling_arrays(1, position=np.array([r], np.int32), **{k: v[r : r + 1] for k, v in settings.items()})
        assert sample(logits[r : r + 1], alone) == together[r : r + 1]


# What changes the logits


def adjusted(row: list[float], **changes: Any) -> list[float]:
    how: SamplingArrays = sampling_arrays(1, **changes)
    return [float(value) for value in adjusted_logits(as_row(row), how, 0)]


def test_repetition_divides_what_is_positive_and_multiplies_the_rest_once_a_token() -> None:
    history = [([0, 1, 1, 0], [2, 1])]
    assert adjusted([4, -3, 0, 5], history=history, repetition_penalty=2.0) == [2, -6, 0, 5]


def test_presence_and_frequency_count_the_output_only() -> None:
    history = [([0, 0, 0], [1, 2, 2, 2])]
    assert adjusted([1, 1, 1, 1], history=history, presence_penalty=0.5) == [1, 0.5, 0.5, 1]
    assert adjusted([1, 1, 1, 1], history=history, frequency_penalty=0.25) == [1, 0.75, 0.25, 1]
    both = adjusted([1, 1, 1, 1], history=history, frequency_penalty=0.25, presence_penalty=-1.0)
    assert both == [1, 1.75, 1.25, 1]


def test_penalties_apply_before_the_bias() -> None:
    history = [([0], [0])]
    changes: dict[str, Any] = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "bias": [{0: 10.0, 2: -math.inf}]}
    assert adjusted([4, 1, 9], history=history, **changes) == [11, 1, -math.inf]


def test_rows_have_their_own_history_and_bias() -> None:
    how = sampling_arrays(
        3,
        history=[([], [1]), ([], []), ([1], [0])],
        bias=[{}, {1: 5.0}, {}],
        presence_penalty=np.array([1, 1, 2], np.float32),
    )
    logits = np.zeros((3, 2), np.float32)
    assert [adjusted_logits(logits[r], how, r).tolist() for r in range(3)] == [[0, -1], [0, 5], [-2, 0]]
    assert sample(logits, how).tolist() == [0, 1, 1]
    assert not logits.any()  # raw logits stay as they are


def test_what_is_not_finite_is_forbidden() -> None:
    row = [math.nan, math.inf, -math.inf, -5.0]
    assert adjusted(row) == [-math.inf] * 3 + [-5]
    assert sample(as_row(row)[None], sampling_arrays(1)).tolist() == [3]
    assert sample(as_row(row)[None], sampling_arrays(1, temperature=1.0)).tolist() == [3]
    overflow = {"history": [([0], [])], "repetition_penalty": 1e-3}
    assert adjusted([3e38, 1], **overflow) == [-math.inf, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_any_allowed_token_there_is_none(temperature: float) -> None:
    how = sampling_arrays(2, temperature=temperature, bias=[{0: -math.inf, 1: -math.inf}, {}])
    assert sample(np.zeros((2, 2), np.float32), how)[0] == NONE_ALLOWED
    assert sample(np.zeros((2, 2), np.float32), how)[1] >= 0


def test_a_mask_allows_what_its_bits_name() -> None:
    allowed = [1, 31, 32, 63, 66]
    how = sampling_arrays(1)
    row = adjusted_logits(np.zeros(67, np.float32), how, 0, mask_of(allowed, 67))
    assert np.flatnonzero(np.isfinite(row)).tolist() == allowed
    assert np.isfinite(adjusted_logits(np.zeros(67, np.float32), how, 0)).all()


def test_choosing_again_leaves_the_distribution_of_the_mask_alone() -> None:
    rows, allowed = 20_000, [1, 2, 4]
    logits = np.tile(np.array([1.0, 0.5, 0.0, 2.0, -1.0], np.float32), (rows, 1))
    how = sampling_arrays(rows, temperature=0.9, seed=np.arange(rows, dtype=np.uint64))
    mask = mask_of(allowed, 5)
    first, again = sample(logits, how), sample(logits, how, np.tile(mask, (rows, 1)))
    chosen = np.where(np.isin(first, allowed), first, again)
    weights = np.exp(logits[0, allowed] / np.float32(0.9))
    expected = weights / weights.sum()
    found = np.array([np.mean(chosen == token) for token in allowed])
    assert abs(found - expected).max() < 4 * math.sqrt(0.25 / rows)
    # The second draw knows nothing of the first one: of what is left, the same shares.
    refused = ~np.isin(first, allowed)
    found = np.array([np.mean(again[refused] == token) for token in allowed])
    assert abs(found - expected).max() < 4 * math.sqrt(0.25 / refused.sum())
