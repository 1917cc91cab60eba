"""The sampler's numpy twin: what `SamplingArrays` promises, written to be read.

The native sampler selects without sorting and sums weights in another order, so it may differ from this one where a
sum lies within rounding of a threshold; everywhere else both choose the same token.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from engine.kernels.batch import Float32, Int32, LogprobArrays, SamplingArrays, UInt32
from engine.kernels.layout import LANES
from engine.kernels.reference_math import exp, sum_lanes

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

_RUN = 1024  # tokens whose weights are summed in float32


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words for a counter and a key (Salmon, Moraes, Dror, Shaw, SC'11)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int, again: int = 0) -> float:
    """The u in [0, 1) of one draw: a multiple of 2**-24 that depends on nothing but its arguments."""
    word = philox4x32((position & _WORD, choice & _WORD, again, 0), (seed & _WORD, seed >> 32))[0]
    return (word >> 8) * 2.0**-24


def sample(logits: Float32, sampling: SamplingArrays, masks: UInt32 | None = None) -> Int32:
    """Choose one token for each row of raw logits [R, vocab], which stay as they are; int32 [R].

    With masks, uint32 [R, ceil(vocab / 32)], those that are drawn again.
    """
    rows = enumerate(logits)
    return np.array([sample_row(raw, sampling, r, None if masks is None else masks[r]) for r, raw in rows], np.int32)


def sample_row(raw: Float32, sampling: SamplingArrays, r: int, mask: UInt32 | None = None) -> int:
    """The token of row r, whose raw logits [vocab] stay as they are; with a mask, the one that is drawn again."""
    row = adjusted_logits(raw, sampling, r, mask)
    if not np.isfinite(row).any():
        return -1
    if sampling.temperature[r] == 0:
        return int(row.argmax())  # the first of equals
    tokens, weights = kept_tokens(
        row, sampling.temperature[r], int(sampling.top_k[r]), sampling.top_p[r], sampling.min_p[r]
    )
    again = int(mask is not None)
    u = uniform(int(sampling.seed[r]), int(sampling.choice[r]), int(sampling.position[r]), again)
    sums = np.cumsum(weights)
    return int(tokens[np.searchsorted(sums, u * sums[-1], side="right")])


def adjusted_logits(raw: Float32, sampling: SamplingArrays, r: int, mask: UInt32 | None = None) -> Float32:
    """Row r's logits [vocab] after penalties, bias and mask; -inf where a token is forbidden."""
    row = raw.copy()
    begin, end = sampling.history_starts[r], sampling.history_starts[r + 1]
    seen = np.unique(sampling.history_tokens[begin:end])
    penalty = sampling.repetition_penalty[r]
    with np.errstate(over="ignore"):  # what overflows is no longer finite, and so forbidden below
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)

    output = sampling.history_tokens[sampling.history_output_starts[r] : end]
    produced, counts = np.unique(output, return_counts=True)
    row[produced] -= sampling.frequency_penalty[r] * counts.astype(np.float32) + sampling.presence_penalty[r]

    entries = slice(sampling.bias_starts[r], sampling.bias_starts[r + 1])
    np.add.at(row, sampling.bias_tokens[entries], sampling.bias_values[entries])

    if mask is not None:
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(row))
        row[bits == 0] = -np.inf
    row[~np.isfinite(row)] = -np.inf
    return row


def kept_tokens(
    row: Float32, temperature: np.float32, top_k: int, top_p: np.float32, min_p: np.float32
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, by rising id, and their weights; `row` [vocab] has a finite logit."""
    order = np.argsort(-row, kind="stable")  # falling logit, the lower id first among equals
    order = order[: np.count_nonzero(np.isfinite(row))]
    if top_k > 0:
        order = order[:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, weight 0
        weights = exp((row[order] - row[order[0]]) / temperature).astype(np.float64)
    if top_p < 1:
        sums = np.cumsum(weights)
        count = int(np.searchsorted(sums, float(top_p) * sums[-1], side="left")) + 1
        order, weights = order[:count], weights[:count]
    keep = weights >= min_p
    order, weights = order[keep], weights[keep]
    by_id = np.argsort(order)
    return order[by_id], weights[by_id]


def write_logprobs(logits: Float32, chosen: Int32, wanted: LogprobArrays) -> None:
    """Fill the out arrays of `wanted` for rows of raw logits [R, vocab] and their tokens [R], -1 where one has none."""
    for r, raw in enumerate(logits):
        if wanted.counts[r] < 0:
            continue
        wanted.tokens[r], wanted.logprobs[r], wanted.ranks[r] = -1, -np.inf, 0
        row = np.where(np.isfinite(raw), raw, np.float32(-np.inf))
        token, largest = int(chosen[r]), row.max()
        if token < 0 or not np.isfinite(largest):
            continue
        total = log_of_sum(row, largest)
        order = np.argsort(-row, kind="stable")  # the lower id first among equals
        finite = order[: np.count_nonzero(np.isfinite(row))]
        listed = [token, *finite[: int(wanted.counts[r])].tolist()]
        wanted.tokens[r, : len(listed)] = listed
        for i, each in enumerate(listed):
            wanted.logprobs[r, i] = (float(row[each]) - float(largest)) - total
        if np.isfinite(row[token]):
            wanted.ranks[r] = 1 + int((order == token).argmax())


def rows_of(wanted: LogprobArrays, rows: slice) -> LogprobArrays:
    """Some rows of the arrays, as views."""
    return LogprobArrays(*(getattr(wanted, field.name)[rows] for field in dataclasses.fields(wanted)))


def log_of_sum(row: Float32, largest: np.float32) -> float:
    """The natural logarithm of the sum of e^(logit - largest) over a row [vocab], -inf counting nothing."""
    total = 0.0
    for begin in range(0, len(row), _RUN):
        run = row[begin : begin + _RUN]
        run = np.pad(run, (0, -len(run) % LANES), constant_values=-np.inf)
        lanes = np.add.accumulate(exp(run - largest).reshape(-1, LANES), axis=0)[-1]  # one after another
        total += float(sum_lanes(lanes))
    return math.log(total)
