"""Texts to vectors, in pieces small enough to go between a decoder's steps.

A batch is as many whole texts as fit its budget of tokens, of one request or of several. A piece is one layer of it:
some milliseconds, after which whoever drives this looks for messages, or computes a step of the decoder that it shares
threads with.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig, available_cpus, requested_isa
from engine.errors import RequestError, StalledRankError
from engine.kernels import create_encoder
from engine.kernels.batch import EncoderProgram, Program, TextBatch
from engine.models.spec import EncoderSpec
from engine.ranks import Ranks
from engine.request import Embedded, EmbedRequest, EncoderInfo, TextInput
from engine.resident import describe_weights, num_parameters, resident_weights

if TYPE_CHECKING:
    from engine.weights import PackedModel

logger = logging.getLogger("seraph.engine")

BATCH_TOKENS = 512
"""Tokens of a batch: enough for every pass over the weights to be worth it, few enough for a core's cache."""

SHARED_BATCH_TOKENS = 64
"""Tokens of a batch that begins while a decoder has work: one layer of it is a small part of a step."""

SHARE = 0.03
"""Of the time that a decoder's steps take, what an encoder may take between them; what it leaves in the caches costs a
little more."""


@dataclass(slots=True)
class _Job:
    """A request, and how far it is."""

    request: EmbedRequest
    out: NDArray[np.float32]  # [inputs, output size]
    num_taken: int = 0  # inputs that are in a batch, or were
    num_done: int = 0
    aborted: bool = False


@dataclass(slots=True)
class _Batch:
    """What the program computes just now."""

    rows: list[tuple[_Job, int]]  # of each text: whose it is, and which of its inputs
    num_tokens: int
    out: NDArray[np.float32] = field(repr=False)


class Embedder:
    """One encoder and its requests, driven from one thread.

    `model` stays the caller's, who closes it after this. Of `config` its threads, isa and huge pages count; `memory` is
    the bytes this process may use. It computes on the threads of the program `beside`, or on its own. `create` compiles
    the program, `clock` gives seconds; `exit_status` as of EngineCore.
    """

    def __init__(
        self,
        model: PackedModel[EncoderSpec],
        config: EngineConfig,
        *,
        memory: int,
        beside: Program | None = None,
        exit_status: int = 0,
        create: Callable[..., EncoderProgram] = create_encoder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        spec = model.info.spec
        self.model_name = model.name
        self.spec = spec
        self.info = EncoderInfo(
            model=model.name,
            output_size=spec.output_size,
            max_input_len=spec.max_position,
            vocab_size=spec.vocab_size,
            num_labels=spec.num_labels,
            checkpoint_format=model.info.checkpoint_format,
            num_parameters=num_parameters(spec),
            weights=describe_weights(model.weights),
        )
        self.program = create(
            spec,
            resident_weights(config.huge_pages, model, memory),
            max_tokens=max(BATCH_TOKENS, spec.max_position),
            ranks=Ranks(
                threads=(config.threads or available_cpus(),),
                cpus=((),),
                stall_timeout=config.stall_timeout,
                exit_status=exit_status,
            ),
            isa=requested_isa() if config.isa == "auto" else config.isa,
            beside=beside,
        )
        self.num_texts = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self._clock = clock
        self._jobs: dict[str, _Job] = {}
        self._queue: list[tuple[int, int, _Job]] = []  # heap: priority, order of arrival
        self._serial = itertools.count()
        self._batch: _Batch | None = None
        self._seconds_per_token = 0.0  # of the last piece

    @property
    def features(self) -> frozenset[str]:
        """Of Capabilities.features, what the encoder brings."""
        return frozenset({"score" if self.spec.num_labels else "embed"})

    def counters(self) -> dict[str, Any]:
        """Of EngineStats, what the encoder counts."""
        return {
            "num_encoded_texts": self.num_texts,
            "num_encoded_tokens": self.num_tokens,
            "encoder_seconds": self.seconds,
        }

    def add(self, request: EmbedRequest) -> None:
        """Take a request; what becomes of it comes out of `advance`. Raises RequestError, and keeps nothing of it."""
        if request.request_id in self._jobs:
            raise RequestError(f"request_id {request.request_id!r} is in use.", param="request_id")
        validate_embed_request(request, self.info)
        if self.spec.num_types < 2 and any(text.second is not None for text in request.inputs):
            raise RequestError(
                f"{self.model_name} knows one type of tokens only: second must be absent.", param="input"
            )
        job = _Job(request, np.empty((len(request.inputs), self.spec.output_size), np.float32))
        self._jobs[request.request_id] = job
        heapq.heappush(self._queue, (request.priority, next(self._serial), job))

    def abort(self, request_id: str) -> None:
        """Forget a request. One that ended already, or never was, is no error."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
            job.aborted = True

    @property
    def has_work(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._jobs)

    def next_seconds(self) -> float:
        """About what the next piece takes, by the last one."""
        tokens = SHARED_BATCH_TOKENS if self._batch is None else self._batch.num_tokens
        return self._seconds_per_token * tokens

    def advance(self, *, shared: bool = False) -> list[Embedded]:
        """Compute one layer of a batch; what requests it ended. `shared`: a decoder waits for the same threads.

        Raises StalledRankError where a thread has stalled.
        """
        started = self._clock()
        batch = self._batch
        try:
            if batch is not None and all(job.aborted for job, _ in batch.rows):
                batch = self._batch = None
            if batch is None:
                batch = self._batch = self._begin(SHARED_BATCH_TOKENS if shared else BATCH_TOKENS)
                if batch is None:
                    return []
            done = self.program.run(1)
        except StalledRankError:
            raise
        except Exception as error:
            logger.exception("a batch of the encoder failed")
            self._batch = None
            jobs = {job.request.request_id: job for job, _ in batch.rows} if batch is not None else dict(self._jobs)
            live = [request_id for request_id, job in jobs.items() if not job.aborted]
            for request_id in live:
                self.abort(request_id)
            return [Embedded(request_id=request_id, error=f"{type(error).__name__}: {error}") for request_id in live]
        seconds = self._clock() - started
        self.seconds += seconds
        self._seconds_per_token = seconds / batch.num_tokens
        if not done:
            return []
        self._batch = None
        return self._finish(batch)

    def check_integrity(self) -> None:
        """Raise AssertionError with the details if a request is lost or held without need."""
        queued = [job for _, _, job in self._queue if not job.aborted]
        in_batch = [] if self._batch is None else [job for job, _ in self._batch.rows if not job.aborted]
        assert self.has_work or self._batch is None or not in_batch, "a batch without requests"
        held = {id(job) for job in (*queued, *in_batch)}
        lost = [request_id for request_id, job in self._jobs.items() if id(job) not in held]
        assert not lost, f"requests that nothing will compute: {lost}"

    def close(self) -> None:
        """Free the program's memory. Idempotent; the embedder cannot be used afterwards."""
        self.program.close()

    def _begin(self, budget: int) -> _Batch | None:
        """The next texts, up to `budget` tokens, and at least one text; None where none wait."""
        rows: list[tuple[_Job, int]] = []
        texts: list[TextInput] = []
        num_tokens = 0
        while self._queue:
            job = self._queue[0][2]
            inputs = job.request.inputs
            while not job.aborted and job.num_taken < len(inputs):
                text = inputs[job.num_taken]
                if texts and num_tokens + len(text.token_ids) > budget:
                    break
                rows.append((job, job.num_taken))
                texts.append(text)
                num_tokens += len(text.token_ids)
                job.num_taken += 1
            if not job.aborted and job.num_taken < len(inputs):
                break
            heapq.heappop(self._queue)
        if not texts:
            return None
        out = np.empty((len(texts), self.spec.output_size), np.float32)
        self.program.begin(_flat(texts, num_tokens, out))
        return _Batch(rows, num_tokens, out)

    def _finish(self, batch: _Batch) -> list[Embedded]:
        ended = []
        self.num_texts += len(batch.rows)
        self.num_tokens += batch.num_tokens
        for (job, index), vector in zip(batch.rows, batch.out, strict=True):
            job.out[index] = vector
            job.num_done += 1
            if job.num_done == len(job.out) and not job.aborted:
                del self._jobs[job.request.request_id]
                ended.append(Embedded(request_id=job.request.request_id, data=job.out.astype("<f4").tobytes()))
        return ended


class Turns:
    """When an encoder may go between a decoder's steps: once it has saved up what its next piece takes."""

    def __init__(self, share: float = SHARE) -> None:
        self._share = share
        self._saved = 0.0

    def worked(self, seconds: float) -> None:
        """The decoder's steps took so long."""
        self._saved += self._share * seconds

    def may(self, seconds: float) -> bool:
        """Whether a piece that takes so long may go now. What is saved beyond it is lost: no two follow each other."""
        self._saved = min(self._saved, seconds)
        return self._saved >= seconds

    def spend(self, seconds: float) -> None:
        """A piece took so long."""
        self._saved -= seconds

    def idle(self) -> None:
        """The decoder has nothing to do, and nobody waits."""
        self._saved = 0.0


def validate_embed_request(request: EmbedRequest, info: EncoderInfo) -> None:
    """Raise RequestError, naming the field, for what this encoder cannot do."""
    if request.model != info.model:
        raise RequestError(
            f"model must be {info.model!r}, got {request.model!r}.", param="model", code="model_not_found"
        )
    if not request.inputs:
        raise RequestError("input must hold at least one text, got none.", param="input")
    for index, text in enumerate(request.inputs):
        ids = text.token_ids
        if not 1 <= len(ids) <= info.max_input_len:
            raise RequestError(
                f"input {index} must have 1 to {info.max_input_len} tokens, got {len(ids)}.",
                param="input",
                code="context_length_exceeded" if ids else None,
            )
        if not (min(ids) >= 0 and max(ids) < info.vocab_size):
            wrong = next(token for token in ids if not 0 <= token < info.vocab_size)
            raise RequestError(
                f"input {index}: token ids must be in [0, {info.vocab_size}), got {wrong}.", param="input"
            )
        if text.second is not None and not 0 <= text.second <= len(ids):
            raise RequestError(f"input {index}: a second text must begin in it, got {text.second}.", param="input")


def _flat(texts: list[TextInput], num_tokens: int, out: NDArray[np.float32]) -> TextBatch:
    """Texts one after another, as the program takes them."""
    starts = np.zeros(len(texts) + 1, np.int32)
    np.cumsum([len(text.token_ids) for text in texts], out=starts[1:])
    token_ids = np.fromiter(itertools.chain.from_iterable(text.token_ids for text in texts), np.int32, num_tokens)
    types = np.zeros(num_tokens, np.int32)
    for text, begin, end in zip(texts, starts, starts[1:], strict=False):
        if text.second is not None:
            types[begin + text.second : end] = 1
    return TextBatch(token_ids, types, starts, out)
