"""Which ranks a configuration and a machine give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.ranks import Ranks, numa_nodes, parse_cpus, plan_ranks

ONE = [range(8)]
TWO = [range(4), range(4, 8)]
UNEVEN = [range(6), range(6, 8)]


@pytest.mark.parametrize(
    ("config", "nodes", "threads", "cpus"),
    [
        ({}, ONE, (8,), [[]]),
        ({"threads": 3}, ONE, (3,), [[]]),
        ({}, TWO, (4, 4), TWO),
        ({"threads": 1}, TWO, (1,), [[]]),  # one thread cannot be two ranks
        ({"tensor_parallel_size": 1}, TWO, (8,), [[]]),
        ({"tensor_parallel_size": 2}, ONE, (4, 4), [range(4), range(4, 8)]),
        ({"tensor_parallel_size": 2, "threads": 3}, ONE, (1, 2), [range(4), range(4, 8)]),
        ({"tensor_parallel_size": 3}, ONE, (2, 3, 3), [range(2), range(2, 5), range(5, 8)]),
        ({"tensor_parallel_size": 3}, TWO, (2, 2, 4), [range(2), range(2, 4), range(4, 8)]),
        ({}, UNEVEN, (5, 3), UNEVEN),
        ({}, [range(1), range(1, 9)], (1, 7), [range(1), range(1, 9)]),
        ({"tensor_parallel_size": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]], (4, 4), TWO),
        ({"tensor_parallel_size": 3}, [[0, 1]], (3, 3, 2), [[0, 1]] * 3),  # more ranks than CPUs share them
    ],
)
def test_ranks_of(
    config: dict[str, int], nodes: Sequence[Sequence[int]], threads: tuple[int, ...], cpus: Sequence[Sequence[int]]
) -> None:
    ranks = plan_ranks(EngineConfig(**config), 12, nodes=nodes, num_cpus=8)  # type: ignore[arg-type]
    assert [*map(list, ranks.cpus)] == [*map(list, cpus)]
    assert ranks.num_threads == config.get("threads", 8)
    assert (sorted(ranks.threads), len(ranks)) == (sorted(threads), len(threads))
    assert ranks.copy_weights == (len(nodes) > 1 and len(ranks) > 1)


def test_every_rank_gets_a_thread_of_its_own() -> None:
    ranks = plan_ranks(EngineConfig(tensor_parallel_size=3), 3, nodes=[[0, 1]], num_cpus=2)
    assert ranks.threads == (1, 1, 1)


def test_no_more_ranks_than_query_heads() -> None:
    assert len(plan_ranks(EngineConfig(), 1, nodes=TWO, num_cpus=8)) == 1
    with pytest.raises(
        ConfigError, match="tensor_parallel_size must be at most 9, the query heads of the model, got 10"
    ):
        plan_ranks(EngineConfig(tensor_parallel_size=10), 9)


def test_what_the_configuration_says_of_stalls_is_passed_on() -> None:
    ranks = plan_ranks(EngineConfig(stall_timeout=2.5), 9, exit_status=7)
    assert (ranks.stall_timeout, ranks.exit_status) == (2.5, 7)


def test_nodes_without_usable_cpus_do_not_count(tmp_path: Path) -> None:
    for node, cpus in enumerate(("0-3\n", "4,6-7\n", "\n", "8-11\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    assert numa_nodes(tmp_path, set(range(12)) - {5}) == ((0, 1, 2, 3), (4, 6, 7), (8, 9, 10, 11))
    assert numa_nodes(tmp_path, {1, 2, 9}) == ((1, 2), (9,))
    assert numa_nodes(tmp_path, {1, 20}) == ((1, 20),)  # not told of all: no nodes are known


def test_where_nothing_is_known_of_nodes_there_is_one(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path, {3, 1}) == ((1, 3),)
    (tmp_path / "node0").mkdir()
    assert numa_nodes(tmp_path, {3, 1}) == ((1, 3),)
    (tmp_path / "node0" / "cpulist").write_text("all of them")
    assert numa_nodes(tmp_path, {3, 1}) == ((1, 3),)


@pytest.mark.parametrize(("text", "cpus"), [("", []), ("0", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("7,9-9", [7, 9])])
def test_lists_of_cpus(text: str, cpus: list[int]) -> None:
    assert parse_cpus(text) == cpus


def test_this_machine_has_a_node() -> None:
    assert sum(map(len, numa_nodes())) >= 1
    assert len(Ranks.single(3)) == 1 and Ranks.single(3).num_threads == 3
