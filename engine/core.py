"""The engine's loop: receive -> schedule -> run -> update -> emit.

`EngineCore` knows nothing of processes, text or the network. Whoever drives it calls `add` and `abort` between steps,
and `step` while `has_work`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from engine import logs
from engine.cache.sizing import num_kv_blocks
from engine.config import (
    BLOCK_SIZE,
    EngineConfig,
    memory_limit,
    requested_isa,
)
from engine.embedder import Embedder, Turns
from engine.errors import ConfigError, RequestError, StalledRankError
from engine.features import features_of
from engine.kernels import create_program
from engine.kernels.batch import Program
from engine.models.spec import EncoderSpec, ModelInfo
from engine.ranks import plan_ranks
from engine.request import (
    IGNORE_EOS_REASON,
    Capabilities,
    Embedded,
    EmbedRequest,
    EngineStats,
    FinishReason,
    Request,
    TokenDelta,
    need_a_choice,
)
from engine.resident import describe_weights, num_parameters, resident_weights
from engine.sampling.masks import Grammars, Vocabulary
from engine.scheduler.plan import Plan
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.sequence import Sequence
from engine.worker.runner import Runner, max_rows

if TYPE_CHECKING:
    from engine.weights import PackedModel

logger = logging.getLogger("seraph.engine")

PREPARING_WAIT = 0.005
"""Seconds that a step waits for a grammar where there is nothing else to do: messages are looked for between steps."""


class EngineCore:
    """One model, its KV memory and its requests, driven from one thread; perhaps an encoder in its steps' gaps.

    `model` and `encoder` stay the caller's, who closes them after the core. `create` compiles the program; `clock`
    gives Unix time for deadlines, `memory` the bytes this process may use. With `exit_status` the process ends, with
    that status, where the thread that steps is the one that stalls; others can be reported. Raises ConfigError where
    `config` asks for more context than the model or the KV memory has, for more KV memory than there is, or for more
    ranks than query heads.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: PackedModel,
        encoder: PackedModel[EncoderSpec] | None = None,
        *,
        create: Callable[..., Program] = create_program,
        clock: Callable[[], float] = time.time,
        memory: Callable[[], int] = memory_limit,
        exit_status: int = 0,
    ) -> None:
        self.config = config
        self.model_name = model.name
        self.info = model.info
        self.num_blocks = num_kv_blocks(config, model.info.spec, memory=memory)
        self.max_model_len = resolve_max_model_len(config, model.info, self.num_blocks)
        self._weights = describe_weights(model.weights)
        self._checkpoint_sha256 = model.source.sha256
        ranks = plan_ranks(config, model.info.spec.num_heads, exit_status=exit_status)
        self.program = create(
            # Some ropes turn otherwise where more positions are served.
            replace(model.info.spec, max_position=self.max_model_len),
            # Of copies of its own every rank gets one anyway.
            model.weights if ranks.copy_weights else resident_weights(config.huge_pages, model, memory()),
            num_blocks=self.num_blocks,
            ranks=ranks,
            isa=requested_isa() if config.isa == "auto" else config.isa,
            kv_dtype=config.kv_cache_dtype,
        )
        if ranks.copy_weights:
            model.give_back()
        self._scheduler = Scheduler(
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            propose=Sequence.guess if config.speculation == "prompt-lookup" else None,
            eos_token_ids=model.info.eos_token_ids,
            clock=clock,
        )
        self._grammars = Grammars(
            lambda: _vocabulary(model.info),
            vocab_size=model.info.spec.vocab_size,
            eos_token_ids=model.info.eos_token_ids,
            num_rows=max_rows(config.max_num_seqs),
            threads=self.program.threads,
        )
        self._runner = Runner(
            self.program,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            vocab_size=model.info.spec.vocab_size,
            grammars=self._grammars,
        )
        self._embedder = None if encoder is None else Embedder(encoder, config, memory=memory(), beside=self.program)
        self._turns = Turns()
        self._embedded: list[Embedded] = []

    def add(self, request: Request) -> None:
        """Take a request; its deltas come out of `step`. Raises RequestError, and then nothing is kept of it."""
        validate_request(
            request,
            model_name=self.model_name,
            vocab_size=self.info.spec.vocab_size,
            eos_token_ids=self.info.eos_token_ids,
        )
        self._scheduler.add(request, preparing=request.grammar is not None)
        if request.grammar is not None and request.request_id in self._scheduler:
            self._grammars.prepare(request)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "request %s taken: %d prompt tokens, %s",
                request.request_id,
                len(request.prompt_token_ids),
                request.sampling,
            )

    def embed(self, request: EmbedRequest) -> None:
        """Take texts to be made vectors; they come out of `take_embedded`. Raises as `add`."""
        if self._embedder is None:
            raise RequestError(
                f"{self.model_name} is no encoder, and there is none beside it.", param="model", code="model_not_found"
            )
        self._embedder.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request of either kind: nothing of it follows. One that ended already, or never was, is no error."""
        self._scheduler.abort(request_id)
        self._grammars.forget(request_id)
        if self._embedder is not None:
            self._embedder.abort(request_id)

    def step(self) -> list[TokenDelta]:
        """Compute one step of the decoder, where it has one to do, and a piece of the encoder's work, where it may.

        A step is at most max_num_batched_tokens tokens; returns what it produced and what it ended. One that the
        program fails ends its requests with FinishReason.ERROR; the others go on. Raises StalledRankError where a
        thread has stalled: then no step can be computed any more.
        """
        if self._embedder is None or not self._embedder.has_work:
            return self._step()
        if not self._scheduler.has_work:
            self._turns.idle()
            self._embedded += self._embedder.advance()
            return []
        started = time.perf_counter()
        deltas = self._step()
        self._turns.worked(time.perf_counter() - started)
        if self._turns.may(self._embedder.next_seconds()):
            started = time.perf_counter()
            self._embedded += self._embedder.advance(shared=True)
            self._turns.spend(time.perf_counter() - started)
        return deltas

    def take_embedded(self) -> list[Embedded]:
        """What has become of texts since the last call."""
        embedded, self._embedded = self._embedded, []
        return embedded

    def _step(self) -> list[TokenDelta]:
        debug = logger.isEnabledFor(logging.DEBUG)
        started = time.perf_counter() if debug else 0.0
        for request_id, failure in self._grammars.take_prepared():
            self._scheduler.release(request_id, failure)
        plan = self._scheduler.schedule()
        if not plan.items:
            if not plan.ended:
                self._grammars.wait(PREPARING_WAIT)
            return self._forget_ended(plan.ended)
        try:
            chosen = self._runner.run(plan)
        except StalledRankError:
            self._scheduler.drop(plan)
            raise
        except Exception as error:
            logger.exception("step %d failed: %s", self._runner.num_steps, plan)
            return self._forget_ended(plan.ended + self._scheduler.fail(plan, f"{type(error).__name__}: {error}"))
        except BaseException:  # an interrupt: nothing was entered, so the plan may be computed again
            self._scheduler.drop(plan)
            raise
        if debug:  # before the update, after which a sequence that has ended holds nothing any more
            self._log_step(plan, time.perf_counter() - started)
        return self._forget_ended(plan.ended + self._scheduler.update(plan, chosen))

    def _forget_ended(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        """Let the grammars go of requests that ended; one that failed its request says why."""
        if len(self._grammars):
            for index, delta in enumerate(deltas):
                if delta.finish_reason is None:
                    continue
                failure = self._grammars.forget(delta.request_id)
                if failure is not None and delta.finish_reason in (FinishReason.REFUSED, FinishReason.ERROR):
                    reason = FinishReason.after(failure)
                    deltas[index] = msgspec.structs.replace(delta, finish_reason=reason, error=str(failure))
        return deltas

    def _log_step(self, plan: Plan, seconds: float) -> None:
        """What a step computed, for whom and how long, without its update (which enters the chosen tokens)."""
        scheduler = self._scheduler
        logger.debug(
            "step %d in %.1f ms: %s; %d running, %d waiting; %d of %d blocks free; %d tokens cached, %d preemptions",
            self._runner.num_steps,
            seconds * 1e3,
            plan,
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.pool.num_free,
            self.num_blocks,
            scheduler.num_cached_tokens,
            scheduler.num_preemptions,
            extra=logs.extra(
                step=self._runner.num_steps,
                seconds=round(seconds, 6),
                num_tokens=plan.num_tokens,
                requests=[item.describe() for item in plan.items],
                **msgspec.structs.asdict(self.stats()),
            ),
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._scheduler.has_work or (self._embedder is not None and self._embedder.has_work)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
            num_steps=self._runner.num_steps,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_output_tokens=scheduler.num_output_tokens,
            num_draft_tokens=scheduler.num_draft_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_masks=self._grammars.num_masks,
            grammar_seconds=self._grammars.seconds,
            num_requests_finished=scheduler.num_finished,
            step_seconds=self._runner.step_seconds,
            **({} if self._embedder is None else self._embedder.counters()),
        )

    def capabilities(self) -> Capabilities:
        return Capabilities(
            engine="native",
            model=self.model_name,
            max_model_len=self.max_model_len,
            vocab_size=self.info.spec.vocab_size,
            isa=self.program.isa,
            threads=self.program.threads,
            num_ranks=self.program.num_ranks,
            max_position=self.info.spec.max_position,
            max_num_seqs=self.config.max_num_seqs,
            checkpoint_format=self.info.checkpoint_format,
            checkpoint_sha256=self._checkpoint_sha256,
            num_parameters=num_parameters(self.info.spec),
            weights=self._weights,
            num_kv_blocks=self.num_blocks,
            kv_cache_tokens=self.num_blocks * BLOCK_SIZE,
            kv_cache_bytes=self.num_blocks * BLOCK_SIZE * self.info.spec.kv_bytes_per_token(self.config.kv_cache_dtype),
            kv_cache_dtype=self.config.kv_cache_dtype,
            features=features_of(
                "native",
                {
                    "generate",
                    "logprobs",
                    "prompt_logprobs",
                    *(("grammar",) if self.info.eos_token_ids else ()),
                    *(() if self._embedder is None else self._embedder.features),
                },
            ),
            encoder=None if self._embedder is None else self._embedder.info,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError with the details if any block, slot or request is lost or counted twice."""
        self._scheduler.check_integrity()
        if self._embedder is not None:
            self._embedder.check_integrity()

    def close(self) -> None:
        """Stop the programs' threads and free the KV memory. Idempotent; the core cannot be used afterwards.

        Raises StalledRankError where a thread does not end and no step has said so.
        """
        if self._embedder is not None:
            self._embedder.close()
        self._grammars.close()
        self.program.close()


def resolve_max_model_len(config: EngineConfig, info: ModelInfo, num_blocks: int) -> int:
    """Tokens of context: the least of what the model was made for, what the KV memory holds and what was asked.

    Raises ConfigError where more was asked explicitly than there is.
    """
    limit, kv_tokens = info.spec.max_position, num_blocks * BLOCK_SIZE
    asked = config.max_model_len
    if asked is None:
        return min(limit, kv_tokens)
    if asked > limit:
        raise ConfigError(f"max_model_len must be at most {limit}, the model's context, got {asked}.")
    if asked > kv_tokens:
        raise ConfigError(
            f"max_model_len must be at most {kv_tokens}, the tokens of KV memory (kv_cache_tokens, kv_cache_memory), "
            f"got {asked}."
        )
    return asked


def _vocabulary(info: ModelInfo) -> Vocabulary:
    from engine.text.tokenizer import Tokenizer  # slow to import, and most engines never need it

    return Tokenizer.from_info(info)


def validate_request(
    request: Request, *, model_name: str, vocab_size: int, eos_token_ids: tuple[int, ...] = ()
) -> None:
    """Raise RequestError, naming the field, for what this engine cannot do or what has no meaning for its model."""
    if request.model != model_name:
        raise RequestError(
            f"model must be {model_name!r}, got {request.model!r}.", param="model", code="model_not_found"
        )
    for name in ("adapter", "pooling"):
        if (value := getattr(request, name)) is not None:
            raise RequestError(f"{name} is not supported by this engine, got {value!r}.", param=name)
    if not request.prompt_token_ids:
        raise RequestError("The prompt must have at least one token, got none.", param="prompt")
    if not 0 <= request.seed < 2**64:
        raise RequestError(f"seed must be in [0, 2**64), got {request.seed}.", param="seed")
    if not 0 <= request.choice_index < 2**31:
        raise RequestError(f"choice_index must be in [0, 2**31), got {request.choice_index}.", param="choice_index")
    if request.deadline is not None and not math.isfinite(request.deadline):
        raise RequestError(f"deadline must be a finite Unix time, got {request.deadline}.", param="deadline")
    sampling = request.sampling
    sampling.validate()
    if request.grammar is None and sampling.structured_outputs is not None:
        raise RequestError("structured_outputs must be compiled into the request's grammar.", param="grammar")
    if request.grammar is not None and sampling.ignore_eos:
        raise RequestError(IGNORE_EOS_REASON, param="ignore_eos")
    if request.grammar is not None and not eos_token_ids:
        raise RequestError(
            "grammar is not supported for this model: it has no token that ends an answer.", param="grammar"
        )
    for param, ids in (
        ("prompt", request.prompt_token_ids),
        ("output_token_ids", request.output_token_ids),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(sampling.logit_bias)),
        ("bad_words", [token for word in sampling.bad_words for token in word]),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise RequestError(f"{param}: token ids must be in [0, {vocab_size}), got {wrong}.", param=param)
    if sampling.bad_words or sampling.allowed_token_ids:
        need_a_choice(sampling, vocab_size, eos_token_ids)
