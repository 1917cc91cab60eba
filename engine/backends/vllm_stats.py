"""vLLM's counts under our names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.request import EngineStats

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import StatLoggerBase


@dataclass(slots=True)
class Counters:
    """What has been counted over all lives of vLLM; written and read by the event loop."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of the KV blocks that are in use
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0
    num_requests_finished: int = 0
    num_encoded_texts: int = 0
    num_encoded_tokens: int = 0

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Take in what one step of vLLM says (SchedulerStats and IterationStats, either may be missing)."""
        if scheduler is not None:
            self.num_running = scheduler.num_running_reqs
            self.num_waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self.kv_usage = scheduler.kv_cache_usage
            if (guessed := scheduler.spec_decoding_stats) is not None:
                self.num_draft_tokens += guessed.num_draft_tokens
                self.num_accepted_tokens += guessed.num_accepted_tokens
        if iteration is not None:
            self.num_steps += 1
            self.num_prompt_tokens += iteration.prompt_token_stats.computed
            self.num_cached_tokens += iteration.prompt_token_stats.cached_tokens
            self.num_output_tokens += iteration.num_generation_tokens
            self.num_preemptions += iteration.num_preempted_reqs
            self.num_requests_finished += len(iteration.finished_requests)

    def snapshot(self, num_blocks: int, num_restarts: int) -> EngineStats:
        """As our own engine tells it."""
        return EngineStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_blocks=num_blocks,
            num_free_blocks=round((1 - self.kv_usage) * num_blocks),
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_preemptions=self.num_preemptions,
            num_requests_finished=self.num_requests_finished,
            num_encoded_texts=self.num_encoded_texts,
            num_encoded_tokens=self.num_encoded_tokens,
            num_restarts=num_restarts,
        )


def logger_class(counters: Counters) -> type[StatLoggerBase]:
    """What vLLM makes one of for each engine. Its own Prometheus metrics go on beside it."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Logger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            counters.record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return Logger
