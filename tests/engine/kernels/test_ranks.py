"""Tensor-parallel ranks of every native build: one rank's bits, memory apart, threads on their CPUs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.kernels import create_program
from engine.kernels.batch import Program
from engine.kernels.native import NativeProgram, build
from engine.ranks import Ranks
from tests.engine.kernels.steps import Piece, logits_of, make_batch, random_weights, sequence_logits
from tests.engine.kernels.test_native import MIXES, SPECS, greedy, ids

TWO = Ranks(threads=(1, 1), cpus=((), ()))
UNEVEN = Ranks(threads=(2, 1, 1), cpus=((), (), ()), copy_weights=True)


@pytest.fixture
def grouped(isa: str) -> Iterator[Program]:
    """Six query heads over two KV heads, so that of three ranks one has none, in parts of their own."""
    program = create_program(SPECS["grouped"], random_weights(SPECS["grouped"]), num_blocks=8, ranks=UNEVEN, isa=isa)
    yield program
    program.close()


@pytest.mark.parametrize("name", SPECS)
def test_ranks_give_the_bits_of_one(isa: str, name: str) -> None:
    spec = SPECS[name]
    formats = list(MIXES.values())[list(SPECS).index(name) % len(MIXES)]
    weights = random_weights(spec, formats[0], formats=formats[1])
    tokens = ids(70, spec)
    programs = [
        create_program(spec, weights, num_blocks=8, isa=isa, kv_dtype="int8" if "norm" in name else "bf16", ranks=ranks)
        for ranks in (Ranks.single(1), TWO, UNEVEN)
    ]
    try:
        for chunk in (70, 25, 3):
            one, *others = (sequence_logits(program, spec, tokens, chunk=chunk) for program in programs)
            for other in others:
                np.testing.assert_array_equal(other, one)
    finally:
        for program in programs:
            program.close()


def test_a_block_is_copied_in_every_ranks_memory(grouped: Program) -> None:
    spec, tokens = SPECS["grouped"], ids(33, SPECS["grouped"])
    grouped.step(make_batch([Piece(tokens[:32], 0, [2])], spec))
    grouped.copy_blocks(np.array([[2, 5]], np.int32))
    grouped.step(make_batch([Piece(ids(32, spec, 1), 0, [2])], spec))  # what the copy was made from
    copied, whole = make_batch([Piece(tokens[32:], 32, [5, 6])], spec), make_batch([Piece(tokens, 0, [0, 1])], spec)
    grouped.step(copied)
    grouped.step(whole)
    np.testing.assert_array_equal(logits_of(copied)[-1], logits_of(whole)[-1])


def test_a_greedy_choice_is_the_first_of_all_ranks_best(grouped: Program) -> None:
    spec = SPECS["grouped"]
    batch = make_batch([Piece(ids(9, spec), 0, [0])], spec, rows=[8], sampling=greedy(1))
    chosen = grouped.step(dataclasses.replace(batch, logits=None))
    assert chosen.tolist() == grouped.step(batch).tolist() == [int(logits_of(batch)[0].argmax())]


def test_ranks_run_on_their_cpus_and_the_caller_only_while_it_steps(isa: str) -> None:
    spec, usable = SPECS["grouped"], sorted(os.sched_getaffinity(0))
    ranks = Ranks(threads=(1, 2), cpus=((usable[0],), (usable[-1],)))
    program = create_program(spec, random_weights(spec), num_blocks=4, ranks=ranks, isa=isa)
    assert isinstance(program, NativeProgram) and (program.threads, program.num_ranks) == (3, 2)
    program.step(make_batch([Piece(ids(9, spec), 0, [0])], spec))
    tasks = {(task / "comm").read_text().strip(): int(task.name) for task in Path("/proc/self/task").iterdir()}
    assert os.sched_getaffinity(tasks["seraph-r1t0"]) == {usable[-1]}
    assert os.sched_getaffinity(0) == set(usable)
    program.close()


def test_every_rank_takes_part_in_a_gather(isa: str) -> None:
    module = build(isa)
    assert module is not None
    for ranks in (1, 2, 3):
        layout = module.TeamLayout(threads=[1] * ranks, cpus=[[]] * ranks, stall_seconds=10, exit_status=0)
        times = module.time_gather(1000, layout, 5)
        assert len(times) == 5 and min(times) > 0
    assert len(module.time_copy(1000, 5)) == 5


@pytest.mark.parametrize(
    "wrong", [{"threads": [1, 0]}, {"threads": []}, {"cpus": [[]]}, {"stall_seconds": 0.0}], ids=repr
)
def test_what_is_no_team_is_refused(isa: str, wrong: dict[str, object]) -> None:
    module = build(isa)
    assert module is not None
    right: dict[str, object] = {"threads": [1, 1], "cpus": [[], []], "stall_seconds": 10.0, "exit_status": 0}
    with pytest.raises(ValueError, match="Team: expected"):
        module.time_gather(1000, module.TeamLayout(**(right | wrong)), 1)
