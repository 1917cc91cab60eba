"""Which tokens each constrained request may choose next, found out while the step that chooses runs.

    loop         | fill arrays, begin ------------- program.step ----------------- finish | update |
    mask threads          | take in new tokens, write mask, set ready | next request |
    sampler                                                  wait for ready, choose

As many threads make masks as compute the step: they take its processors from it, and it had better lose as much of
each. A request's grammar is compiled in a further thread, before the request is scheduled, so that no step waits for
that. The library lets go of the interpreter's lock while it compiles and while it makes a mask.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
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
    """A live request's grammar. Between `begin` and `finish` it belongs to a mask thread."""

    request: Request
    compiled: Future[LLMatcher]
    num_consumed: int  # output tokens that the matcher has taken in
    seconds: float = 0.0  # of a processor, for its masks
    error: SeraphError | None = None  # why it can go on no longer


@dataclass(slots=True)
class Rows:
    """What one request's masks of one step are made of."""

    request_id: str
    first_row: int
    num_output: int
    new: Sequence[int]  # output tokens since the last step
    draft: Sequence[int]  # guessed to follow: a further row for each
    stop_token_ids: frozenset[int]
    constraint: Constraint = field(init=False)


class Grammars:
    """The grammars of live requests, and the masks of one step. Driven from one thread.

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
        self.masks = np.zeros((num_rows, -(-vocab_size // 32)), np.uint32)
        self.ready = np.zeros(num_rows, np.int32)  # the sampler waits for a row's 1
        self.mask_seconds = 0.0  # total time of a processor
        self.num_masks = 0
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._prototypes: OrderedDict[str, LLMatcher] = OrderedDict()
        self._live: dict[str, Constraint] = {}
        self._preparing: dict[str, Constraint] = {}
        self._compile_thread: ThreadPoolExecutor | None = None
        self._num_mask_threads = min(threads, MAX_MASK_THREADS)
        self._mask_threads: ThreadPoolExecutor | None = None
        self._under_way: list[Future[tuple[int, float]]] = []

    # A request's life

    def prepare(self, request: Request) -> None:
        """Begin to compile a request's grammar; it must stay out of every step until `take_prepared` names it."""
        if self._compile_thread is None:
            self._compile_thread = _threads(1, "grammar-compile")
            self._mask_threads = _threads(self._num_mask_threads, "grammar-mask")
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

    def num_consumed(self, request_id: str) -> int:
        """Output tokens of a request that its matcher has taken in, or is about to."""
        return self._live[request_id].num_consumed

    def close(self) -> None:
        """End the threads. Idempotent."""
        for threads in (self._compile_thread, self._mask_threads):
            if threads is not None:
                threads.shutdown(wait=True, cancel_futures=True)

    # A step

    def begin(self, rows: list[Rows]) -> None:
        """Have the masks of a step made: `masks` and `ready`, from each request's first row on."""
        assert self._mask_threads is not None and not self._under_way
        for each in rows:
            constraint = each.constraint = self._live[each.request_id]
            constraint.num_consumed += len(each.new)
            self.ready[each.first_row : each.first_row + 1 + len(each.draft)] = 0
        step = iter(rows)  # the threads share it; the interpreter's lock makes taking one atomic
        num_threads = min(self._num_mask_threads, len(rows))
        self._under_way = [self._mask_threads.submit(self._make, step) for _ in range(num_threads)]

    def finish(self) -> None:
        """Wait until no thread writes masks any more."""
        under_way, self._under_way = self._under_way, []
        for each in under_way:
            num_masks, seconds = each.result()
            self.num_masks += num_masks
            self.mask_seconds += seconds

    def _make(self, step: Iterator[Rows]) -> tuple[int, float]:
        """Masks of requests that no other thread has taken; how many, and in how much time of a processor."""
        num_masks, began = 0, time.thread_time()
        for rows in step:
            constraint = rows.constraint
            started = time.thread_time()
            try:
                if constraint.error is None:
                    num_masks += self._make_rows(rows, constraint.compiled.result())
            except Exception as error:  # whatever it is, it must end this request alone and let the sampler go on
                logger.exception("request %s: its grammar failed", rows.request_id)
                constraint.error = EngineError(f"The grammar failed: {type(error).__name__}: {error}")
            # Rows that were not made: of a grammar that failed, and after a guess that is forbidden.
            for row in range(rows.first_row, rows.first_row + len(rows.draft) + 1):
                if not self.ready[row]:
                    self.masks[row] = 0
                    self.ready[row] = 1
            constraint.seconds += time.thread_time() - started
            if constraint.seconds > MASK_SECONDS + MASK_SECONDS_PER_TOKEN * rows.num_output:
                constraint.error = RequestError("The grammar of the answer takes too long.")
        return num_masks, time.thread_time() - began

    def _make_rows(self, rows: Rows, matcher: LLMatcher) -> int:
        """One mask, and one after each guess that the grammar allows, for what follows others is never chosen.

        Returns their number.
        """
        constraint, sampling = rows.constraint, rows.constraint.request.sampling
        if rows.new and not matcher.consume_tokens(list(rows.new)):
            constraint.error = RequestError(f"The grammar did not take the tokens of the answer: {matcher.get_error()}")
            return 0
        num_ahead = 0
        for ahead in range(len(rows.draft) + 1):
            row = rows.first_row + ahead
            mask = self.masks[row]
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                constraint.error = RequestError(f"The grammar of the answer failed: {matcher.get_error()}")
                return ahead
            if rows.num_output + ahead < sampling.min_tokens:
                _forbid(mask, rows.stop_token_ids)
            self.ready[row] = 1
            if ahead == len(rows.draft) or rows.draft[ahead] in self._eos_token_ids:
                break
            if matcher.try_consume_tokens([rows.draft[ahead]]) == 0:
                break
            num_ahead += 1
        if num_ahead and not matcher.rollback(num_ahead):
            constraint.error = EngineError(f"The grammar could not be rolled back: {matcher.get_error()}")
        return ahead + 1

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
