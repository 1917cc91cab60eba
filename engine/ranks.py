"""How an engine's threads form tensor-parallel ranks, and on which CPUs each rank runs."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from engine.config import EngineConfig, available_cpus
from engine.errors import ConfigError

NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Ranks of threads, as the kernels' team is made of them. One rank runs wherever the process may."""

    threads: tuple[int, ...]  # of each rank
    cpus: tuple[tuple[int, ...], ...]  # that the threads of each rank run on; none: anywhere
    copy_weights: bool = False  # each rank reads a copy of its part of them, on its NUMA node
    stall_timeout: float = 10.0  # seconds that a step waits for a thread without progress
    # Where the thread that waits for a step is the one that stalls, the others end the process with this status; 0:
    # they do not, and wait for it.
    exit_status: int = 0

    @classmethod
    def single(cls, threads: int) -> Ranks:
        return cls(threads=(threads,), cpus=((),))

    @property
    def num_threads(self) -> int:
        return sum(self.threads)

    def __len__(self) -> int:
        return len(self.threads)


def plan_ranks(
    config: EngineConfig,
    num_heads: int,
    *,
    nodes: Sequence[Sequence[int]] | None = None,
    num_cpus: int | None = None,
    exit_status: int = 0,
) -> Ranks:
    """The ranks of a model of so many query heads; by default one for each NUMA node.

    `nodes` are the CPUs of each, `num_cpus` how many of them may be busy at once (None: this machine's). Raises
    ConfigError for more ranks than heads or threads.
    """
    nodes = numa_nodes() if nodes is None else nodes
    cpus = available_cpus() if num_cpus is None else num_cpus
    size = config.tensor_parallel_size or max(1, min(len(nodes), num_heads, config.threads or cpus))
    if size > num_heads:
        raise ConfigError(
            f"tensor_parallel_size must be at most {num_heads}, the query heads of the model, got {size}."
        )
    of_rank = _cpus_of(size, nodes)
    return Ranks(
        threads=_threads_of(config.threads or max(cpus, size), [max(1, len(each)) for each in of_rank]),
        cpus=of_rank,
        copy_weights=size > 1 and len(nodes) > 1,
        stall_timeout=config.stall_timeout,
        exit_status=exit_status,
    )


def numa_nodes(folder: Path = NODES, usable: Collection[int] | None = None) -> tuple[tuple[int, ...], ...]:
    """The CPUs of each NUMA node that are among `usable` (None: those of this process), nodes without any left out."""
    usable = os.sched_getaffinity(0) if usable is None else usable
    found = []
    for path in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        try:
            cpus = parse_cpus((path / "cpulist").read_text())
        except (OSError, ValueError):  # no such file in some containers: then all CPUs are one node
            return (tuple(sorted(usable)),)
        found.append(tuple(cpu for cpu in cpus if cpu in usable))
    nodes = tuple(cpus for cpus in found if cpus)
    return nodes if sum(map(len, nodes)) == len(usable) else (tuple(sorted(usable)),)


def parse_cpus(text: str) -> list[int]:
    """The CPUs of a list as the kernel writes it, "0-3,8". Raises ValueError for anything else."""
    cpus: list[int] = []
    for part in text.strip().split(",") if text.strip() else []:
        if (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part)) is None:
            raise ValueError(text)
        cpus += range(int(match[1]), int(match[2] or match[1]) + 1)
    return cpus


def _cpus_of(size: int, nodes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The CPUs of each rank: its node's, or its nodes', or, of several ranks of a node, its part of them.

    More ranks than a node has CPUs share all of those: who is on which is for the system to balance.
    """
    if size == 1:
        return ((),)
    count = len(nodes)
    if size <= count:
        return tuple(
            tuple(cpu for node in nodes[rank * count // size : (rank + 1) * count // size] for cpu in node)
            for rank in range(size)
        )
    found: list[tuple[int, ...]] = []
    for index, node in enumerate(nodes):
        num_here = -(-(index + 1) * size // count) - -(-index * size // count)
        if num_here > len(node):
            found += [tuple(node)] * num_here
            continue
        bounds = [len(node) * i // num_here for i in range(num_here + 1)]
        found += [tuple(node[low:high]) for low, high in pairwise(bounds)]
    return tuple(found)


def _threads_of(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """`total` threads, at least as many as weights, in proportion to them; everyone gets one."""
    spare, whole = total - len(weights), sum(weights)
    bounds = [0, *(spare * weight // whole for weight in accumulate(weights))]
    return tuple(high - low + 1 for low, high in pairwise(bounds))
