from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.kernels import available_isas, create_program
from engine.kernels.batch import Program, Weights
from engine.models.spec import DecoderSpec

ProgramFactory = Callable[..., Program]


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every native build that this machine can execute."""
    return str(request.param)


@pytest.fixture
def make_program() -> Iterator[ProgramFactory]:
    """`create_program` whose programs are closed when the test ends."""
    programs: list[Program] = []

    def make(spec: DecoderSpec, weights: Weights, **how: Any) -> Program:
        programs.append(create_program(spec, weights, **how))
        return programs[-1]

    yield make
    for program in programs:
        program.close()


@pytest.fixture
def program_factory(isa: str, make_program: ProgramFactory) -> ProgramFactory:
    """Makes native programs: program_factory(spec, weights, num_blocks=..., threads=1); one test for each build."""

    def make(spec: DecoderSpec, weights: Weights, *, num_blocks: int, threads: int = 1) -> Program:
        return make_program(spec, weights, num_blocks=num_blocks, threads=threads, isa=isa)

    return make
