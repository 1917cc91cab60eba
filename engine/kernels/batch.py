"""One step's arrays: what the runner fills and a Program computes. Plain shapes, shared by every kernel build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.kernels.layout import PackedTensor

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]


@dataclass(slots=True, frozen=True)
class SamplingArrays:
    """How each row that wants a token chooses it. R rows, in the order of StepBatch.logits_rows.

    The arrays stay the same, what they hold may change: a program may keep what it made of them for the next step.

    A row's logits l, float32, go through these in order:

    1. repetition penalty: for each token of the row's history, once, l = l / r where l > 0, else l * r
    2. presence and frequency: l = l - (frequency * count + presence) for each token that the output part of the
       history holds `count` > 0 times
    3. logit bias: l = l + value, entry by entry; -inf forbids a token
    4. a token whose bit in a mask is 0 is forbidden (`Program.choose_again`; a step has no masks). A logit that is not
       finite is forbidden too.
    5. temperature 0 takes the largest l, the lowest id among equals, and ends here. Otherwise a token weighs
       w = exp((l - lmax) / temperature), so the best one weighs exactly 1, and "in order" means by falling l, the
       lower id first among equals
    6. top-k keeps the first k tokens in order
    7. top-p keeps, of those, the shortest beginning of the order whose weight reaches top_p times the weight of all
       of them: at least one token
    8. min-p keeps, of those, the tokens with w >= min_p, which is probability >= min_p * the largest probability
    9. one draw: u in [0, 1) is the upper 24 bits of the first word of Philox4x32-10 (Salmon et al., SC'11) with key
       (seed's low word, its high word) and counter (position, choice, again, 0), where `again` is 1 with a mask and 0
       without. Over the kept tokens by rising id, with a running sum of w, it takes the first token whose sum exceeds
       u * the sum of all. Sums of weights are float64, or within 2^-24 of that

    A row with a grammar is drawn without it first; a token that the grammar allows stays, else one is drawn with the
    mask. Without selections that has the distribution of the mask alone: p(t) + (1 - P) p(t) / P = p(t) / P, where P is
    the probability of all that is allowed, as long as both allow the same. The best token is the same either way then.

    Where every token is forbidden, the row's result is -1.
    """

    temperature: Float32  # [R]
    top_k: Int32  # [R], <= 0: off
    top_p: Float32  # [R], 1: off
    min_p: Float32  # [R], 0: off
    repetition_penalty: Float32  # [R], 1: off
    presence_penalty: Float32  # [R], 0: off
    frequency_penalty: Float32  # [R], 0: off
    seed: UInt64  # [R]
    choice: Int32  # [R]
    position: Int32  # [R], absolute position (prompt and output) of the token to be chosen
    history_starts: Int32  # [R + 1] into history_tokens; a row with all penalties off may be empty
    history_output_starts: Int32  # [R], where in history_tokens the row's output begins
    history_tokens: Int32  # [H], prompt then output
    bias_starts: Int32  # [R + 1] into bias_tokens
    bias_tokens: Int32  # [B]
    bias_values: Float32  # [B], added; -inf forbids
    again: Int32 | None = None  # [R], 1: `choose_again` may be asked for the row, whose logits are kept for it


@dataclass(slots=True, frozen=True)
class LogprobArrays:
    """Which log-probabilities each row wants, and where they go. R rows, in the order of StepBatch.logits_rows.

    They are the model's own: of the softmax of raw logits, before penalties, bias, mask, temperature and selections.
    A token whose logit is not finite has -inf and rank 0. A rank is 1 + the tokens with larger logits or, among equals,
    lower ids; the largest come in that order.

    The sum of e^(logit - largest) adds runs of 1,024 tokens in 16 float32 lanes each, and these in float64, so that a
    row's values are the same bits beside any other rows and on every build that fuses multiply-adds.
    """

    counts: Int32  # [R], so many of the largest, at most N; -1: nothing is written of this row
    targets: Int32  # [R], the row's token where it is given: nothing is drawn, it is the row's result; -1: it is chosen
    tokens: Int32  # out [R, 1 + N], the row's token, then the largest; -1 where there are no more
    logprobs: Float32  # out [R, 1 + N], theirs, natural logarithms
    ranks: Int32  # out [R], of the row's token


@dataclass(slots=True)
class StepBatch:
    """T tokens of Q requests, flat. Request q owns tokens query_starts[q] to query_starts[q + 1].

    Its keys and values lie in block_tables[g, q]; position p is slot p % 32 of entry p // 32. A step writes the
    keys and values of its own tokens first, then each token attends positions 0 to its own (causal) or to the end
    of the request (not causal).
    """

    token_ids: Int32  # [T]; -1 - r: the token that row r of the previous step chose (token 0 where that is -1)
    positions: Int32  # [T], consecutive within a request
    query_starts: Int32  # [Q + 1]
    seq_lens: Int32  # [Q], tokens of context once this step is done
    block_tables: Int32  # [num_kv_groups, Q, max_blocks]; entries past the sequence are not read
    logits_rows: Int32  # [R], indices into T, ascending
    sampling: SamplingArrays | None = None  # None: nothing is chosen
    logprobs: LogprobArrays | None = None  # only beside sampling
    logits: Float32 | None = None  # out [R, vocab], raw logits, before penalties
    hidden: Float32 | None = None  # out [R, hidden], after the final norm
    adapters: Int32 | None = None  # [T], -1: none
    causal: bool = True


@dataclass(slots=True, frozen=True)
class TextBatch:
    """T tokens of N whole texts, flat: text n owns tokens starts[n] to starts[n + 1]."""

    token_ids: Int32  # [T]
    types: Int32  # [T], 1 for the tokens of a second text beside the first one
    starts: Int32  # [N + 1]
    out: Float32  # out [N, EncoderSpec.output_size], embeddings or logits


class EncoderProgram(Protocol):
    """An EncoderSpec and its packed weights, compiled for one instruction set. One batch at a time."""

    max_tokens: int
    isa: str

    def begin(self, batch: TextBatch) -> None:
        """Take a batch, of at most `max_tokens` tokens, in place of one that is not done.

        Raises ValueError for arrays of the wrong shape or values out of range; the batch before it goes on then.
        """
        ...

    def run(self, layers: int) -> bool:
        """Compute the next `layers` layers of the batch; True once its `out` is written."""
        ...

    def close(self) -> None:
        """Free the memory. Idempotent."""
        ...


class Program(Protocol):
    """A DecoderSpec and its packed weights, compiled for one instruction set, with the KV memory it writes."""

    num_blocks: int
    threads: int
    num_ranks: int
    isa: str

    def step(self, batch: StepBatch) -> Int32:
        """Run the whole forward pass and the sampler.

        Returns the chosen tokens, int32 [R] (empty without sampling); -1 where every token was forbidden.

        Raises ValueError, before anything is written, for arrays of the wrong shape or indices out of range, and
        StalledRankError, now and for ever, where a thread stalls.
        """
        ...

    def choose_again(self, row: int, mask: UInt32) -> int:
        """Another token for a row of the last step that had `sampling.again`, of those that `mask` allows.

        mask: uint32 [ceil(vocab / 32)], bit t of word w allows token 32 w + t. Returns -1 where none is left. Deferred
        token ids of the next step see it. Several threads may ask for different rows at once, none during a step.

        Raises ValueError for a row that was not kept or a mask of the wrong shape.
        """
        ...

    def copy_blocks(self, pairs: Int32) -> None:
        """Copy KV blocks, int32 [n, 2] of (from, to)."""
        ...

    def close(self) -> None:
        """Stop the threads and free the KV memory. Idempotent."""
        ...


Weights = Mapping[str, PackedTensor]
"""The tensors of a spec's `tensor_shapes`, by name."""
