"""The engine's configuration, resolved and validated once, before anything is built.

This is the only module of `engine` that reads the environment.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

BLOCK_SIZE = 32
"""Tokens per KV block: the unit of allocation, of prefix reuse and of one attention step."""

DEFAULT_MODEL = "smollm2-135m-instruct"

ISAS = ("avx512", "avx2", "portable", "reference")
"""Kernel builds, best first; `reference` is the numpy twin, never chosen by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the native engine is told. `threads` 0 and `isa` "auto" are resolved where the machine is known."""

    model: str = DEFAULT_MODEL
    max_model_len: int | None = None  # tokens; None: the model's own limit, capped to what the KV cache holds
    max_num_seqs: int = 64  # requests computed in one step
    max_num_batched_tokens: int = 512  # tokens computed in one step (the token budget)
    kv_cache_tokens: int = 16384  # tokens of KV memory over all requests
    enable_prefix_caching: bool = True
    threads: int = 0  # 0: every CPU this process may use
    isa: str = "auto"
    home: Path | None = None  # where models live; None: SERAPH_HOME, else ~/.cache/seraph

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"{key} must be {allowed}, got {getattr(self, key)!r}.")

        need(bool(self.model), "model", "a model alias or source")
        need(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2 tokens")
        need(1 <= self.max_num_seqs <= 1024, "max_num_seqs", "between 1 and 1024")
        need(
            self.max_num_seqs <= self.max_num_batched_tokens <= 65536,
            "max_num_batched_tokens",
            f"between max_num_seqs ({self.max_num_seqs}) and 65536",
        )
        need(self.kv_cache_tokens >= 2 * BLOCK_SIZE, "kv_cache_tokens", f"at least {2 * BLOCK_SIZE}")
        need(0 <= self.threads <= 1024, "threads", "0 (automatic) or a count up to 1024")
        need(self.isa == "auto" or self.isa in ISAS, "isa", f"auto or one of {', '.join(ISAS)}")

    @property
    def num_blocks(self) -> int:
        return math.ceil(self.kv_cache_tokens / BLOCK_SIZE)


def seraph_home(explicit: Path | None = None) -> Path:
    """The folder that models are fetched and packed into: `explicit`, else SERAPH_HOME, else ~/.cache/seraph."""
    if explicit is not None:
        return explicit
    if value := os.environ.get("SERAPH_HOME"):
        return Path(value).expanduser()
    return Path.home() / ".cache" / "seraph"


def requested_isa() -> str:
    """SERAPH_ISA, or "auto" where it is unset."""
    value = os.environ.get("SERAPH_ISA", "auto") or "auto"
    if value != "auto" and value not in ISAS:
        raise ConfigError(f"SERAPH_ISA must be auto or one of {', '.join(ISAS)}, got {value!r}.")
    return value


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: ours, with `changes`."""
    return {**os.environ, **changes}


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut to the cgroup's quota (version 2, then 1), at least 1."""
    cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return max(1, min(cpus, math.ceil(quota))) if quota is not None else cpus


def _cgroup_quota() -> float | None:
    """CPUs the cgroup grants, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        cfs = Path("/sys/fs/cgroup/cpu")
        quota_us = int((cfs / "cpu.cfs_quota_us").read_text())
        return quota_us / int((cfs / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
