"""The machine: processor, cores and memory, as this process may use them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.config import available_cpus, memory_limit
from engine.ranks import numa_nodes
from server.doctor.finding import Finding, ok, readable, warning

RELEVANT_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)
"""Flags of cpuinfo that kernels use or could."""

LITTLE_MEMORY = 1_000_000_000
"""Bytes under which the default model, its KV cache and the server begin to be tight."""


def examine(
    *,
    proc: Path = Path("/proc"),
    cpus: Callable[[], int] = available_cpus,
    memory: Callable[[], int] = memory_limit,
    nodes: Callable[[], Sequence[Sequence[int]]] = numa_nodes,
) -> Iterator[Finding]:
    """Findings about the machine. The arguments stand in for where they come from."""
    yield ok("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    model, flags = _cpuinfo(proc)
    yield ok("processor", f"{model}; {', '.join(flag for flag in RELEVANT_FLAGS if flag in flags) or 'no known flags'}")
    yield _cores(cpus())
    yield _nodes(nodes())
    yield _memory(proc, memory())


def _cpuinfo(proc: Path) -> tuple[str, frozenset[str]]:
    """The first processor's name and flags."""
    try:
        text = (proc / "cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^(?:model name|Hardware|cpu)\s*: *(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: *(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or "unknown", frozenset(flags[1].split() if flags else ())


def _cores(usable: int) -> Finding:
    total, affinity = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    limits = []
    if affinity < total:
        limits.append(f"affinity {affinity}")
    if usable < affinity:
        limits.append("the cgroup's quota")
    return ok("cores", f"{usable} usable of {total}" + (f", by {' and '.join(limits)}" if limits else ""))


def _nodes(nodes: Sequence[Sequence[int]]) -> Finding:
    if len(nodes) == 1:
        return ok("NUMA nodes", "1: one tensor-parallel rank by default")
    cores = ", ".join(str(len(cpus)) for cpus in nodes)
    return ok("NUMA nodes", f"{len(nodes)} of {cores} usable cores: a tensor-parallel rank each by default")


def _memory(proc: Path, limit: int) -> Finding:
    fields = dict(re.findall(r"^(\w+): +(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE))
    total, available = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    detail = f"{readable(total)}, {readable(available)} available"
    if limit < total:
        detail += f"; the cgroup allows {readable(limit)}"
    if min(available, limit) < LITTLE_MEMORY:
        return warning(
            "memory", detail, "Free some, raise the container's limit, or serve with a smaller --kv-cache-memory."
        )
    return ok("memory", detail)
