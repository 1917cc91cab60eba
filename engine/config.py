"""The engine's configuration, resolved and validated once, before anything is built.

This is the only module of `engine` that reads the environment.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

BLOCK_SIZE = 32
"""Tokens per KV block: the unit of allocation, of prefix reuse and of one attention step."""

DEFAULT_MODEL = "smollm2-135m-instruct"

ISAS = ("avx512", "avx2", "portable", "reference")
"""Kernel builds, best first; `reference` is the numpy twin, never chosen by itself."""

MIN_KV_TOKENS = 2 * BLOCK_SIZE

AUTO_KV_TOKENS = 16384
"""Tokens of KV memory where nothing else is asked for: two requests of the default model's full length."""

AUTO_KV_SHARE = 0.25
"""Most of the memory this process may use that the KV cache takes by itself: the weights are to stay in memory too."""

MEMORY_FORMS = "a size as 2GiB or 800MB, or a share of the memory this process may use as 25%"

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?([A-Za-z]*)")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?) ?%")

QUANTIZATIONS = ("none", "int8", "int4")
"""What may become of float weights: bfloat16, 8-bit or 4-bit quants."""

FOLDER_DTYPES = ("bfloat16", "float16", "float32")
"""What the weights of a folder may be that `seraph convert` writes."""

HUGE_PAGES = ("auto", "on", "off")
"""Whether weights are copied into huge pages: "auto" where that takes at most HUGE_PAGES_SHARE of the memory."""

HUGE_PAGES_SHARE = 0.125

SPECULATIONS = ("prompt-lookup", "off")
"""How following tokens are guessed while few sequences decode: from the sequence's own text, or not at all."""

KV_DTYPES = ("bf16", "int8")
"""What keys and values are kept in: bfloat16, or 8-bit quants with a scale for every token and KV head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the native engine is told. `threads` 0 and `isa` "auto" are resolved where the machine is known."""

    model: str = DEFAULT_MODEL
    embedding_model: str | None = None  # an encoder that shares this engine's process, as a source
    max_model_len: int | None = None  # tokens; None: the model's own limit, capped to what the KV cache holds
    max_num_seqs: int = 64  # requests computed in one step
    max_num_batched_tokens: int = 512  # tokens computed in one step (the token budget)
    kv_cache_tokens: int | None = None  # tokens of KV memory over all requests; None: by kv_cache_memory
    kv_cache_memory: int | str | None = (
        None  # the same in bytes, or as parse_memory reads it; None: engine.cache.sizing
    )
    kv_cache_dtype: str = "bf16"  # one of KV_DTYPES
    enable_prefix_caching: bool = True
    speculation: str = "prompt-lookup"  # one of SPECULATIONS
    quantization: str | None = None  # one of QUANTIZATIONS; None: see load_model
    huge_pages: str = "auto"  # one of HUGE_PAGES
    threads: int = 0  # of all ranks together; 0: every CPU this process may use
    tensor_parallel_size: int | None = None  # ranks; None: one for each NUMA node
    stall_timeout: float = 10.0  # seconds without progress after which a thread counts as stalled
    isa: str = "auto"
    home: Path | None = None  # where models live; None: SERAPH_HOME, else ~/.cache/seraph

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, allowed: str) -> None:
            if not ok:
                raise ConfigError(f"{key} must be {allowed}, got {getattr(self, key)!r}.")

        need(bool(self.model), "model", "a model alias or source")
        need(self.embedding_model is None or bool(self.embedding_model), "embedding_model", "a model alias or source")
        need(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "at least 2 tokens")
        need(1 <= self.max_num_seqs <= 1024, "max_num_seqs", "between 1 and 1024")
        need(
            self.max_num_seqs <= self.max_num_batched_tokens <= 65536,
            "max_num_batched_tokens",
            f"between max_num_seqs ({self.max_num_seqs}) and 65536",
        )
        tokens, memory = self.kv_cache_tokens, self.kv_cache_memory
        need(tokens is None or tokens >= MIN_KV_TOKENS, "kv_cache_tokens", f"at least {MIN_KV_TOKENS}")
        if tokens is not None and memory is not None:
            raise ConfigError(
                "kv_cache_tokens and kv_cache_memory both say how large the KV cache is: give one of them, "
                f"got {tokens!r} and {memory!r}."
            )
        if isinstance(memory, str):
            try:
                parse_memory(memory)
            except ValueError:
                need(False, "kv_cache_memory", MEMORY_FORMS)
        for key, words in (
            ("kv_cache_dtype", KV_DTYPES),
            ("huge_pages", HUGE_PAGES),
            ("speculation", SPECULATIONS),
            ("quantization", (None, *QUANTIZATIONS)),
        ):
            need(getattr(self, key) in words, key, f"one of {', '.join(word for word in words if word)}")
        need(0 <= self.threads <= 1024, "threads", "0 (automatic) or a count up to 1024")
        size = self.tensor_parallel_size
        need(size is None or 1 <= size <= 1024, "tensor_parallel_size", "between 1 and 1024")
        if size is not None and 0 < self.threads < size:
            raise ConfigError(
                f"threads must be at least tensor_parallel_size ({size}), one for each rank, got {self.threads}."
            )
        need(0.01 <= self.stall_timeout <= 3600, "stall_timeout", "between 0.01 and 3600 seconds")
        need(self.isa == "auto" or self.isa in ISAS, "isa", f"auto or one of {', '.join(ISAS)}")

    def load_options(self) -> dict[str, Any]:
        """What `load_model` is told beside the model and its home: only what was asked for."""
        return {} if self.quantization is None else {"quantization": self.quantization}


def parse_memory(text: str) -> int | float:
    """Bytes (int) of a size as "2GiB", "800 MB" or "4096"; a share (float, above 0, at most 1) of one as "25%".

    Raises ValueError for anything else.
    """
    if match := _SHARE.fullmatch(text.strip()):
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise ValueError(text)
        return share
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or (nbytes := int(float(match[1]) * unit)) < 1:
        raise ValueError(text)
    return nbytes


def seraph_home(explicit: Path | None = None) -> Path:
    """The folder that models are fetched and packed into: `explicit`, else SERAPH_HOME, else ~/.cache/seraph."""
    if explicit is not None:
        return explicit
    if value := os.environ.get("SERAPH_HOME"):
        return Path(value).expanduser()
    return Path.home() / ".cache" / "seraph"


def gives_huge_pages(file: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> bool:
    """Whether the system gives huge pages to a process that asks for them."""
    try:
        return "[never]" not in file.read_text()
    except OSError:
        return False


def requested_isa() -> str:
    """SERAPH_ISA, or "auto" where it is unset."""
    value = os.environ.get("SERAPH_ISA", "auto") or "auto"
    if value != "auto" and value not in ISAS:
        raise ConfigError(f"SERAPH_ISA must be auto or one of {', '.join(ISAS)}, got {value!r}.")
    return value


VLLM_PARENT, VLLM_LOG = "SERAPH_VLLM_PARENT", "SERAPH_VLLM_LOG"
"""Names in the environment of vLLM's processes: who has started them, and where they write."""


def prepare_vllm(*, log: Path, log_config: Path) -> None:
    """Say in our own environment, which vLLM reads and its processes inherit, what it cannot be told otherwise.

    Its processes are spawned: forked ones would keep our sockets. What the environment says already stays.
    """
    os.environ.update({VLLM_PARENT: str(os.getpid()), VLLM_LOG: str(log), "VLLM_LOGGING_CONFIG_PATH": str(log_config)})
    for name, value in {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",  # nothing is reported to anybody
        "HF_HUB_OFFLINE": "1",  # what is served was fetched before
    }.items():
        os.environ.setdefault(name, value)


def environment_value(name: str) -> str:
    """For processes that are not given a configuration."""
    return os.environ.get(name, "")


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: ours, with `changes`."""
    return {**os.environ, **changes}


def our_packages() -> str:
    """PYTHONPATH for a child: it finds the packages that we found, however this program was started."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)


def has_gpu(dev: Path = Path("/dev")) -> bool:
    """Whether there is a GPU that vLLM might use: NVIDIA's driver or AMD's."""
    return (dev / "nvidiactl").exists() or (dev / "kfd").exists()


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


def memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory this process may use: the machine's, cut to what its cgroup and those above it allow (v2, v1)."""
    total = re.search(r"^MemTotal: +(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    assert total is not None, "proc(5) promises it"
    return min([int(total[1]) * 1024, *_cgroup_memory_limits(proc, cgroups)])


def _cgroup_memory_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits_upwards(cgroups, path, "memory.max")
            yield from _limits_upwards(cgroups / "unified", path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(cgroups / "memory", path, "memory.limit_in_bytes")


def _limits_upwards(root: Path, path: str, name: str) -> Iterator[int]:
    """The limits of a group and of those above it.

    A container may have its own group as the root of the mount and yet read its path as it is outside: then the folders
    on the way do not exist, and the root is the one that counts.
    """
    for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
            yield int((folder / name).read_text())
        if folder == root:
            return
