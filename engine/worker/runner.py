"""Turns a plan into one step's arrays, runs the program on them, and returns the chosen tokens.

What does not change while a sequence runs (how it samples) or only grows (its block table, its history) is kept per
slot and brought up to date; a step gathers the rows it needs. A decode step therefore costs a few array operations and
a short loop, however long the contexts are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import BLOCK_SIZE
from engine.kernels.batch import Float32, Int32, LogprobArrays, Program, SamplingArrays, StepBatch
from engine.request import TokenLogprobs
from engine.sampling.bad_words import BadWords
from engine.sampling.masks import Grammars, Rows
from engine.scheduler.lookup import ROWS
from engine.scheduler.plan import Plan, Scheduled
from engine.scheduler.scheduler import MAX_SCORED
from engine.scheduler.sequence import Sequence

_INT32_MAX = 2**31 - 1
_NO_INTS = np.zeros(0, np.int32)
_NO_FLOATS = np.zeros(0, np.float32)


def max_rows(max_num_seqs: int) -> int:
    """Tokens that one step chooses or is given, at most: each sequence's next, those guessed ahead, and scored ones."""
    return max_num_seqs + ROWS + MAX_SCORED


class Runner:
    """Owns the step arrays of one program. Not safe for threads; `run` returns before anything is reused.

    `step_seconds` is the total time spent inside `program.step`, by `clock` (monotonic seconds).
    """

    def __init__(
        self,
        program: Program,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.program = program
        self.step_seconds = 0.0
        self.num_steps = 0
        self._clock = clock
        seqs, tokens, blocks = max_num_seqs, max_num_batched_tokens, -(-max_model_len // BLOCK_SIZE)

        # By slot.
        self._slots = [_Slot(vocab_size) for _ in range(seqs)]
        self._tables = np.zeros((seqs, blocks), np.int32)
        self._how = _SamplingRows(seqs)

        # The step's own, in plan order.
        self._token_ids = np.zeros(tokens, np.int32)
        self._positions = np.zeros(tokens, np.int32)
        self._query_starts = np.zeros(seqs + 1, np.int32)
        self._seq_lens = np.zeros(seqs, np.int32)
        self._step_tables = np.zeros((1, seqs, blocks), np.int32)
        rows = max_rows(seqs)
        self._logits_rows = np.zeros(rows, np.int32)
        self._step_how = _SamplingRows(rows)
        self._gathered: list[int] = []  # the slots whose rows _step_how holds
        self._position = np.zeros(rows, np.int32)
        self._no_starts = np.zeros(rows + 1, np.int32)
        # Of so many rows without penalties and bias, some of them with a grammar or none, over the arrays here.
        self._plain: dict[tuple[int, bool], SamplingArrays] = {}
        self._grammars = grammars  # None: no request has one
        self._again = np.zeros(rows, np.int32)

    def run(self, plan: Plan) -> list[int]:
        """Compute the plan; returns the tokens of each of its items that samples (`Scheduled.num_rows`), in order.

        Log-probabilities that its sequences want are put on its items. Raises whatever the program raises; the arrays
        stay usable.
        """
        batch = self._fill(plan.items)
        started = self._clock()
        try:
            if plan.copies:
                pairs = [(copy.source, copy.target) for copy in plan.copies]
                self.program.copy_blocks(np.array(pairs, np.int32))
            tokens: list[int] = self.program.step(batch).tolist()
            if self._grammars is not None and len(self._grammars):
                self._grammars.settle(self._constrained(plan.items), tokens, self.program.choose_again)
        finally:
            self.step_seconds += self._clock() - started
            self.num_steps += 1
        return tokens if batch.logprobs is None else _hand_out(plan, tokens, batch.logprobs)

    def _fill(self, items: list[Scheduled]) -> StepBatch:
        """The plan as arrays; they are views of this runner's memory, valid until the next call."""
        token_ids: list[int] = []
        positions: list[int] = []
        starts = [0]
        seq_lens: list[int] = []
        slots: list[int] = []
        logits_rows: list[int] = []
        sampled: list[_Row] = []
        any_wanted = False  # log-probabilities
        for item in items:
            seq, start, end = item.seq, item.start, item.start + item.num_tokens
            self._refresh(seq)
            if item.num_tokens == 1:
                token_ids.append(seq.tokens[start])
                positions.append(start)
            else:
                token_ids += seq.tokens[start:end]
                token_ids += item.draft
                positions += range(start, end)
            starts.append(len(token_ids))
            seq_lens.append(end)
            slots.append(seq.slot)
            if item.num_scored:
                scored = range(seq.num_scored, seq.num_scored + item.num_scored)
                logits_rows += [len(token_ids) - item.num_tokens + i - start for i in scored]
                sampled += [(seq, None)] * item.num_scored
                any_wanted = True
            if item.samples:
                draft, first = item.draft, len(token_ids) - item.num_rows
                for ahead in range(len(draft) + 1):
                    logits_rows.append(first + ahead)
                    sampled.append((seq, draft[:ahead]))
                if seq.request.sampling.logprobs is not None:
                    any_wanted = True

        num_tokens, num_seqs, num_rows = len(token_ids), len(slots), len(logits_rows)
        self._token_ids[:num_tokens] = token_ids
        self._positions[:num_tokens] = positions
        self._query_starts[: num_seqs + 1] = starts
        self._seq_lens[:num_seqs] = seq_lens
        self._logits_rows[:num_rows] = logits_rows
        np.take(self._tables, slots, axis=0, out=self._step_tables[0, :num_seqs], mode="clip")
        return StepBatch(
            token_ids=self._token_ids[:num_tokens],
            positions=self._positions[:num_tokens],
            query_starts=self._query_starts[: num_seqs + 1],
            seq_lens=self._seq_lens[:num_seqs],
            block_tables=self._step_tables[:, :num_seqs],
            logits_rows=self._logits_rows[:num_rows],
            sampling=self._sampling(sampled) if sampled else None,
            logprobs=_logprob_arrays(items) if any_wanted else None,
        )

    @staticmethod
    def _constrained(items: list[Scheduled]) -> list[Rows]:
        """The rows whose tokens a grammar has to allow."""
        constrained: list[Rows] = []
        row = 0
        for item in items:
            seq, request = item.seq, item.seq.request
            row += item.num_scored
            if request.grammar is not None and item.samples:
                constrained.append(Rows(request.request_id, row, seq.num_output, item.draft, seq.stop_token_ids))
            row += item.num_rows
        return constrained

    def _refresh(self, seq: Sequence) -> None:
        """Bring the slot of `seq` up to date with the blocks it got since it was last here."""
        slot = self._slots[seq.slot]
        if slot.residency != seq.residency:
            slot.move_in(seq)
            self._how.set(seq.slot, seq)
            self._gathered = []
        have, want = slot.num_blocks, len(seq.blocks)
        if have < want:
            self._tables[seq.slot, have:want] = seq.blocks[have:]
            slot.num_blocks = want

    def _sampling(self, rows: list[_Row]) -> SamplingArrays:
        num_rows = len(rows)
        how = self._step_how
        numbers = [seq.slot for seq, _ in rows]
        if numbers != self._gathered:
            how.gather(self._how, numbers)
            self._gathered = numbers
        self._position[:num_rows] = [len(seq.tokens) + len(ahead or ()) for seq, ahead in rows]
        slots = [self._slots[number] for number in numbers]
        constrained = any(slot.constrained for slot in slots)
        if constrained:  # but for tokens that are given, which stay
            self._again[:num_rows] = [
                slot.constrained and ahead is not None for slot, (_, ahead) in zip(slots, rows, strict=True)
            ]
        plain = not any(slot.penalized or slot.biased for slot in slots)
        if plain and (num_rows, constrained) in self._plain:
            return self._plain[num_rows, constrained]

        history_starts = history_output_starts = self._no_starts
        history_tokens = _NO_INTS
        if any(slot.penalized for slot in slots):
            histories = [slot.history_of(*row) for slot, row in zip(slots, rows, strict=True)]
            history_tokens = np.concatenate(histories)
            history_starts = _starts(histories)
            # A row without penalties has an empty history; any place within it will do as its output's start.
            prompts = [
                seq.num_prompt if slot.penalized and ahead is not None else 0
                for slot, (seq, ahead) in zip(slots, rows, strict=True)
            ]
            history_output_starts = history_starts[:-1] + np.array(prompts, np.int32)

        bias_starts, bias_tokens, bias_values = self._no_starts, _NO_INTS, _NO_FLOATS
        if any(slot.biased for slot in slots):
            biases = [slot.bias_of(*row) for slot, row in zip(slots, rows, strict=True)]
            bias_tokens = np.concatenate([tokens for tokens, _ in biases])
            bias_values = np.concatenate([values for _, values in biases])
            bias_starts = _starts([tokens for tokens, _ in biases])

        arrays = SamplingArrays(
            temperature=how.temperature[:num_rows],
            top_k=how.top_k[:num_rows],
            top_p=how.top_p[:num_rows],
            min_p=how.min_p[:num_rows],
            repetition_penalty=how.repetition_penalty[:num_rows],
            presence_penalty=how.presence_penalty[:num_rows],
            frequency_penalty=how.frequency_penalty[:num_rows],
            seed=how.seed[:num_rows],
            choice=how.choice[:num_rows],
            position=self._position[:num_rows],
            history_starts=history_starts[: num_rows + 1],
            history_output_starts=history_output_starts[:num_rows],
            history_tokens=history_tokens,
            bias_starts=bias_starts[: num_rows + 1],
            bias_tokens=bias_tokens,
            bias_values=bias_values,
            again=self._again[:num_rows] if constrained else None,
        )
        if plain:
            self._plain[num_rows, constrained] = arrays
        return arrays


_Row = tuple[Sequence, list[int] | None]
"""One token to choose: of a sequence, after these tokens that were guessed to follow; None: it is given."""


class _SamplingRows:
    """How each of N rows samples: the part of SamplingArrays that does not change while a sequence runs."""

    def __init__(self, num_rows: int) -> None:
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.zeros(num_rows, np.int32)
        self.top_p = np.zeros(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.repetition_penalty = np.zeros(num_rows, np.float32)
        self.presence_penalty = np.zeros(num_rows, np.float32)
        self.frequency_penalty = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.uint64)
        self.choice = np.zeros(num_rows, np.int32)
        self._all: tuple[NDArray[Any], ...] = (
            *(self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.choice),
            *(self.repetition_penalty, self.presence_penalty, self.frequency_penalty),
        )

    def set(self, row: int, seq: Sequence) -> None:
        sampling = seq.request.sampling
        self.temperature[row] = sampling.temperature
        self.top_k[row] = min(sampling.top_k, _INT32_MAX)
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.repetition_penalty[row] = sampling.repetition_penalty
        self.presence_penalty[row] = sampling.presence_penalty
        self.frequency_penalty[row] = sampling.frequency_penalty
        self.seed[row] = seq.request.seed
        self.choice[row] = seq.request.choice_index

    def gather(self, source: _SamplingRows, rows: list[int]) -> None:
        """Set row i to row rows[i] of `source`."""
        index = np.array(rows, np.intp)
        for ours, theirs in zip(self._all, source._all, strict=True):
            np.take(theirs, index, out=ours[: len(rows)], mode="clip")


class _Slot:
    """What the runner has seen of the sequence that lives in one slot."""

    __slots__ = (
        *("_bad_words", "_bias", "_early_bias", "_history", "_num_history", "_vocab_size"),
        *("biased", "constrained", "num_blocks", "penalized", "residency"),
    )

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.residency = -1
        self.num_blocks = 0
        self.penalized = False
        self.biased = False
        self.constrained = False  # by a grammar
        self._history = _NO_INTS  # grown by doubling; the first _num_history entries count
        self._num_history = 0
        self._bias = self._early_bias = (_NO_INTS, _NO_FLOATS)
        self._bad_words = BadWords(())

    def move_in(self, seq: Sequence) -> None:
        sampling = seq.request.sampling
        self.residency = seq.residency
        self.num_blocks = 0
        self.penalized = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        self._num_history = 0
        bias = dict(sampling.logit_bias)
        self._bad_words = BadWords(sampling.bad_words)
        bias |= dict.fromkeys(self._bad_words.single, -np.inf)
        self._bias = _bias_arrays(bias)
        self._early_bias = self._bias
        self.constrained = seq.request.grammar is not None
        if seq.num_output < sampling.min_tokens and not self.constrained:  # a grammar may allow nothing else
            self._early_bias = _bias_arrays(bias | dict.fromkeys(seq.stop_token_ids, -np.inf))
        if sampling.allowed_token_ids is not None:
            others = _all_but(sampling.allowed_token_ids, self._vocab_size)
            self._bias, self._early_bias = _joined(others, self._bias), _joined(others, self._early_bias)
        self.biased = len(self._bias[0]) + len(self._early_bias[0]) > 0 or bool(sampling.bad_words)

    def history_of(self, seq: Sequence, ahead: list[int] | None) -> Int32:
        """Every token of the sequence and those guessed to follow, int32, where penalties read them; else empty."""
        if not self.penalized or ahead is None:
            return _NO_INTS
        have, want = self._num_history, len(seq.tokens)
        if want > len(self._history):
            grown = np.zeros(max(want, 2 * len(self._history)), np.int32)
            grown[:have] = self._history[:have]
            self._history = grown
        self._history[have:want] = seq.tokens[have:]
        self._num_history = want
        history = self._history[:want]
        return np.concatenate([history, np.array(ahead, np.int32)]) if ahead else history

    def bias_of(self, seq: Sequence, ahead: list[int] | None) -> tuple[Int32, Float32]:
        """Token ids and what is added to their logits; until min_tokens, whatever would stop is forbidden.

        So is what would complete a bad word. A token may come more than once: each value is added.
        """
        if ahead is None:
            return _NO_INTS, _NO_FLOATS
        bias = self._early_bias if seq.num_output + len(ahead) < seq.request.sampling.min_tokens else self._bias
        completing = self._bad_words.completing(seq.tokens, seq.num_prompt, ahead)
        return _joined(bias, _bias_arrays(dict.fromkeys(completing, -np.inf))) if completing else bias


def _logprob_arrays(items: list[Scheduled]) -> LogprobArrays:
    """What the rows of a step want of log-probabilities, and room for them."""
    wanted: list[tuple[int, int]] = []  # of each row so many of the largest, -1 nothing; its token where it is given
    for item in items:
        seq, sampling = item.seq, item.seq.request.sampling
        scored = range(seq.num_scored, seq.num_scored + item.num_scored)
        wanted += [(sampling.prompt_logprobs or 0, seq.tokens[i + 1]) for i in scored]
        wanted += [(-1 if sampling.logprobs is None else sampling.logprobs, -1)] * item.num_rows
    counts, targets = (np.array(each, np.int32) for each in zip(*wanted, strict=True))
    shape = (len(wanted), 1 + max(0, int(counts.max())))
    return LogprobArrays(
        counts=counts,
        targets=targets,
        tokens=np.empty(shape, np.int32),
        logprobs=np.empty(shape, np.float32),
        ranks=np.empty(len(wanted), np.int32),
    )


def _hand_out(plan: Plan, chosen: list[int], arrays: LogprobArrays) -> list[int]:
    """Give the plan's items their rows' log-probabilities; returns the tokens of the rows that were not given them."""
    counts, ranks = arrays.counts.tolist(), arrays.ranks.tolist()
    ids, logprobs = arrays.tokens.tolist(), arrays.logprobs.tolist()

    def row(r: int) -> TokenLogprobs:
        top = zip(ids[r][1 : 1 + counts[r]], logprobs[r][1 : 1 + counts[r]], strict=True)
        return TokenLogprobs(chosen[r], logprobs[r][0], ranks[r], [pair for pair in top if pair[0] >= 0])

    tokens: list[int] = []
    at = 0
    for item in plan.items:
        item.prompt_logprobs = [row(r) for r in range(at, at + item.num_scored)]
        at += item.num_scored
        if item.num_rows and counts[at] >= 0:
            item.logprobs = [row(r) for r in range(at, at + item.num_rows)]
        tokens += chosen[at : at + item.num_rows]
        at += item.num_rows
    return tokens


def _bias_arrays(bias: dict[int, float]) -> tuple[Int32, Float32]:
    if not bias:
        return _NO_INTS, _NO_FLOATS
    return np.fromiter(bias, np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))


def _all_but(allowed: tuple[int, ...], vocab_size: int) -> tuple[Int32, Float32]:
    """A bias that forbids every other token."""
    forbidden = np.ones(vocab_size, bool)
    forbidden[list(allowed)] = False
    tokens = np.flatnonzero(forbidden).astype(np.int32)
    return tokens, np.full(len(tokens), -np.inf, np.float32)


def _joined(one: tuple[Int32, Float32], other: tuple[Int32, Float32]) -> tuple[Int32, Float32]:
    return np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])


def _starts(arrays: list[Int32]) -> Int32:
    """Where each array begins once they lie one after another, and where the last one ends: int32 [len(arrays) + 1]."""
    starts = np.zeros(len(arrays) + 1, np.int32)
    np.cumsum([len(array) for array in arrays], out=starts[1:])
    return starts
