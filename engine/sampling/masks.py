"""What each constrained request may say next: tokens that were chosen freely are checked, and others chosen again.

    loop         | fill arrays | program.step, freely | check each token | choose again  | update |
    mask threads                                                        | where refused |

A model nearly always chooses what its form allows, and to check one token costs a small part of what it costs to find
out about all of them. So a mask is made only where the grammar refuses a token, and the token is chosen again from the
logits that the program has kept (SamplingArrays says why that leaves the distribution as it is). As many threads do so
as compute a step: they are its processors.

A request's grammar is compiled in a further thread, before the request is scheduled, so that no step waits for that.
The library lets go of the interpreter's lock while it compiles and while it makes a mask.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError, RequestError, SeraphError
from engine.request import Request
from engine.sampling.limits import COMPILE_STACK, MASK_SECONDS, MASK_SECONDS_PER_TOKEN

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger("seraph.engine")

MAX_COMPILED = 32
"""Compiled grammars that are kept to be copied, the most recently used ones."""

MAX_MASK_THREADS = 8
"""More would wait for the interpreter's lock, which each of them needs between masks."""


class Vocabulary(Protocol):
    """What is asked of a model's tokenizer (engine.text.Tokenizer)."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    special_token_ids: frozenset[int]

    @property
    def pieces(self) -> tuple[bytes, ...]: ...
    def encode_text(self, text: str, *, add_bos: bool = True) -> list[int]: ...


@dataclass(slots=True, eq=False)
class Constraint:
    """A live request's grammar. Within `settle` it may belong to a mask thread."""

    request: Request
    compiled: Future[LLMatcher]
    num_consumed: int  # output tokens that the matcher has taken in
    seconds: float = 0.0  # of a processor
    error: SeraphError | None = None  # why it can go on no longer


@dataclass(slots=True)
class Rows:
    """One request's rows of a step: its next token and, after each that was guessed, what would follow it."""

    request_id: str
    first_row: int
    num_output: int  # tokens of the answer before this step
    draft: Sequence[int]
    stop_token_ids: frozenset[int]
    num_settled: int = 0  # rows whose tokens the grammar allows; those after a wrong guess count for nothing
    num_masks: int = 0
    seconds: float = 0.0  # of a processor

    @property
    def row(self) -> int:
        """The first that is not settled."""
        return self.first_row + self.num_settled

    def settle(self, token: int) -> bool:
        """Enter an allowed token; whether a further row depends on it."""
        self.num_settled += 1
        return self.num_settled <= len(self.draft) and self.draft[self.num_settled - 1] == token


ChooseAgain = Callable[[int, NDArray[np.uint32]], int]
"""`Program.choose_again`: row and mask to token, -1 where none is left."""


class Grammars:
    """The grammars of live requests. Driven from one thread.

    `vocabulary` is asked for when the first grammar comes. `num_rows` bounds the rows of a step, which `threads`
    compute.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        *,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        num_rows: int,
        threads: int = 1,
    ) -> None:
        self.seconds = 0.0  # total time of a processor, for checks and masks
        self.num_masks = 0
        self._masks = np.zeros((num_rows, -(-vocab_size // 32)), np.uint32)
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._prototypes: OrderedDict[str, LLMatcher] = OrderedDict()
        self._live: dict[str, Constraint] = {}
        self._preparing: dict[str, Constraint] = {}
        self._compile_thread: ThreadPoolExecutor | None = None
        self._num_threads = min(threads, MAX_MASK_THREADS)
        self._mask_threads: ThreadPoolExecutor | None = None  # beside the one that drives this

    # A request's life

    def prepare(self, request: Request) -> None:
        """Begin to compile a request's grammar; it must stay out of every step until `take_prepared` names it."""
        if self._compile_thread is None:
            self._compile_thread = _threads(1, "grammar-compile")
            if self._num_threads > 1:
                self._mask_threads = _threads(self._num_threads - 1, "grammar-mask")
        compiled = self._compile_thread.submit(self._compile, request)
        constraint = Constraint(request, compiled, num_consumed=len(request.output_token_ids))
        self._live[request.request_id] = self._preparing[request.request_id] = constraint

    def take_prepared(self) -> list[tuple[str, SeraphError | None]]:
        """Requests that are ready for their first step since the last call, and those that failed, with the error."""
        if not self._preparing:
            return []
        done = [(request_id, each) for request_id, each in self._preparing.items() if each.compiled.done()]
        for request_id, _ in done:
            del self._preparing[request_id]
        return [(request_id, _error_of(each.compiled)) for request_id, each in done]

    def wait(self, seconds: float) -> None:
        """Until something is prepared, at most so long."""
        wait([each.compiled for each in self._preparing.values()], timeout=seconds, return_when="FIRST_COMPLETED")

    def forget(self, request_id: str) -> SeraphError | None:
        """Let a request go that has ended, or was never here; returns what its grammar failed with."""
        self._preparing.pop(request_id, None)
        constraint = self._live.pop(request_id, None)
        if constraint is None:
            return None
        constraint.compiled.cancel()
        return constraint.error

    def __len__(self) -> int:
        return len(self._live)

    def close(self) -> None:
        """End the threads. Idempotent."""
        for threads in (self._compile_thread, self._mask_threads):
            if threads is not None:
                threads.shutdown(wait=True, cancel_futures=True)

    # A step

    def settle(self, rows: list[Rows], tokens: list[int], choose_again: ChooseAgain) -> None:
        """Have the tokens that a step chose taken in, and others chosen in place of those that are refused.

        `tokens` holds one for each row of the step. The first of a request that can go on no longer becomes -1, and
        `forget` says why. What is settled must be entered: a grammar does not go back.
        """
        refused = [each for each in rows if not self._follow(each, tokens)]
        if refused:
            step = iter(refused)  # the threads share it; the interpreter's lock makes taking one atomic
            others = []
            if self._mask_threads is not None:
                count = min(self._num_threads, len(refused)) - 1
                others = [self._mask_threads.submit(self._choose, step, tokens, choose_again) for _ in range(count)]
            try:
                self._choose(step, tokens, choose_again)
            finally:
                wait(others)
        self.num_masks += sum(each.num_masks for each in refused)
        self.seconds += sum(each.seconds for each in rows)

    def _follow(self, rows: Rows, tokens: list[int]) -> bool:
        """Take in a request's tokens as far as its grammar allows them; False where it refuses one that counts."""
        constraint = self._live.get(rows.request_id)
        if constraint is None:  # aborted while the step ran
            return True
        began = time.thread_time()
        try:
            if constraint.error is not None:
                raise constraint.error
            matcher = constraint.compiled.result()
            known = rows.num_output + rows.num_settled
            if constraint.num_consumed != known:
                raise RuntimeError(f"it has taken in {constraint.num_consumed} tokens of {known}")
            goes_on = True
            while goes_on and (token := tokens[rows.row]) >= 0:
                if self._too_early(constraint, rows) and token in rows.stop_token_ids:
                    return False
                if not self._take(matcher, token):
                    _must(not matcher.is_error(), matcher)
                    return False
                constraint.num_consumed += 1
                goes_on = rows.settle(token)
        except Exception as error:
            self._fail(constraint, rows, tokens, error)
        finally:
            _charge(constraint, rows, time.thread_time() - began)
        return True

    def _take(self, matcher: LLMatcher, token: int) -> bool:
        """Take a token in, if the grammar allows it."""
        if token in self._eos_token_ids:  # which has no bytes to try
            return matcher.is_accepting() and matcher.consume_token(token)
        return matcher.try_consume_tokens([token]) == 1

    def _choose(self, step: Iterator[Rows], tokens: list[int], choose_again: ChooseAgain) -> None:
        """Choose again for requests that no other thread has taken, each from the row on that was refused."""
        for rows in step:
            while self._choose_one(rows, tokens, choose_again) and not self._follow(rows, tokens):
                pass

    def _choose_one(self, rows: Rows, tokens: list[int], choose_again: ChooseAgain) -> bool:
        """Put a token in place of the one that was refused; whether a further row depends on it."""
        constraint = self._live[rows.request_id]
        began = time.thread_time()
        try:
            matcher, mask = constraint.compiled.result(), self._masks[rows.row]
            rows.num_masks += 1
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            _must(not matcher.is_error(), matcher)
            if self._too_early(constraint, rows):
                _forbid(mask, rows.stop_token_ids)
            token = tokens[rows.row] = choose_again(rows.row, mask)
            if token >= 0:
                _must(matcher.consume_token(token), matcher)
                constraint.num_consumed += 1
                return rows.settle(token)
        except Exception as error:
            self._fail(constraint, rows, tokens, error)
        finally:
            _charge(constraint, rows, time.thread_time() - began)
        return False

    @staticmethod
    def _too_early(constraint: Constraint, rows: Rows) -> bool:
        """Whether the answer must not stop yet."""
        return rows.num_output + rows.num_settled < constraint.request.sampling.min_tokens

    @staticmethod
    def _fail(constraint: Constraint, rows: Rows, tokens: list[int], error: Exception) -> None:
        """Whatever it is, it must end this request alone."""
        if not isinstance(error, SeraphError):
            logger.exception("request %s: its grammar failed", rows.request_id)
            error = EngineError(f"The grammar failed: {type(error).__name__}: {error}")
        constraint.error = error
        tokens[rows.row] = -1

    # Compiling

    def _compile(self, request: Request) -> LLMatcher:
        """A matcher that has taken in what the request has said already. Raises RequestError where there is none."""
        from llguidance import LLMatcher

        from engine.sampling.limits import parser_limits

        assert request.grammar is not None
        if self._tokenizer is None:
            self._tokenizer = make_tokenizer(self._vocabulary(), self._vocab_size)
        prototype = self._prototypes.get(request.grammar)
        if prototype is None:
            prototype = LLMatcher(self._tokenizer, request.grammar, log_level=0, limits=parser_limits())
            if not prototype.is_error():
                prototype.compute_bitmask()  # the lexer's first states, here and not in a step
            if prototype.is_error():
                raise RequestError(f"The grammar could not be compiled: {prototype.get_error()}")
            self._prototypes[request.grammar] = prototype
            if len(self._prototypes) > MAX_COMPILED:
                self._prototypes.popitem(last=False)
        self._prototypes.move_to_end(request.grammar)
        matcher = prototype.deep_copy()
        if request.output_token_ids and not matcher.consume_tokens(list(request.output_token_ids)):
            raise RequestError(f"The grammar does not allow output_token_ids: {matcher.get_error()}")
        return matcher


def _must(done: bool, matcher: LLMatcher) -> None:
    if not done:
        raise RequestError(f"The grammar of the answer failed: {matcher.get_error()}")


def _charge(constraint: Constraint, rows: Rows, seconds: float) -> None:
    """Count time of a processor; an answer that has taken too much ends with its next token."""
    rows.seconds += seconds
    constraint.seconds += seconds
    if constraint.error is None and constraint.seconds > MASK_SECONDS + MASK_SECONDS_PER_TOKEN * rows.num_output:
        constraint.error = RequestError("The grammar of the answer takes too long.")


def _error_of(compiled: Future[LLMatcher]) -> SeraphError | None:
    error = compiled.exception()
    if error is None or isinstance(error, SeraphError):
        return error
    return EngineError(f"The grammar could not be compiled: {type(error).__name__}: {error}")


def _forbid(mask: NDArray[np.uint32], token_ids: frozenset[int]) -> None:
    """Clear some tokens' bits, unless nothing would be left: an answer that is complete cannot go on."""
    bits = [(token_id // 32, np.uint32(1) << np.uint32(token_id % 32)) for token_id in token_ids]
    before = [mask[word] for word, _ in bits]
    for word, bit in bits:
        mask[word] &= ~bit
    if not mask.any():
        for (word, _), value in reversed(list(zip(bits, before, strict=True))):
            mask[word] |= value


def make_tokenizer(vocabulary: Vocabulary, vocab_size: int) -> LLTokenizer:
    """The library's view of a vocabulary: the bytes that each token adds to a text. Takes a fraction of a second."""
    from llguidance import LLTokenizer

    wrapper = _Wrapper(vocabulary)
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(vocabulary.eos_token_ids))  # type: ignore[arg-type]


class _Wrapper:
    """What the library asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        # What ends an answer must not be found in the middle of one, where its text would fit.
        special = vocabulary.special_token_ids | frozenset(vocabulary.eos_token_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = vocabulary.bos_token_id
        self.tokens = list(vocabulary.pieces)
        self.special_token_ids = sorted(special)
        self._encode = vocabulary.encode_text
        self._ids = {piece: i for i, piece in reversed(list(enumerate(self.tokens))) if piece and i not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """The usual tokens of a text that the grammar prescribes."""
        data = text.encode() if isinstance(text, str) else text
        try:
            ids = self._encode(data.decode(), add_bos=False)
        except UnicodeDecodeError:
            return self._greedy(data)
        # Some tokenizers put a space before a text: then what they make is not this one.
        return ids if b"".join([self.tokens[i] for i in ids]) == data else self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                if (token_id := self._ids.get(data[start:end])) is not None:
                    break
            else:
                raise ValueError(f"the vocabulary cannot write {json.dumps(data.decode('utf-8', 'replace'))}")
            ids.append(token_id)
            start = end
        return ids


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads with room for deeply nested grammars."""
    all_are_there = threading.Barrier(count)
    before = threading.stack_size(COMPILE_STACK)
    try:
        executor = ThreadPoolExecutor(count, thread_name_prefix=name)
        wait([executor.submit(all_are_there.wait) for _ in range(count)])  # started here, while that is the size
    finally:
        threading.stack_size(before)
    return executor
