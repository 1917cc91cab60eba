"""What real models go on with: beside transformers in float32, and beside the numpy twin; tests/golden says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.config import available_cpus
from engine.kernels import available_isas
from engine.kernels.batch import Float32, Int32, Program
from engine.kernels.reference import ReferenceProgram
from engine.models.spec import DecoderSpec
from engine.weights import PackedModel, load_model
from tests.engine.kernels.conftest import ProgramFactory
from tests.engine.kernels.steps import Piece, logits_of, make_batch, sequence_logits

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = {"smollm2": "smollm2-135m-instruct", "gemma3": "gemma3-270m"}
NUM_BLOCKS = 4

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    params=[pytest.param(isa, marks=pytest.mark.full if isa == "portable" else ()) for isa in available_isas()]
)
def isa(request: pytest.FixtureRequest) -> str:
    """Every native build; the portable one takes half a minute."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> PackedModel:
    return load_model(MODELS[name])


@pytest.fixture(scope="module")
def golden(name: str) -> Arrays:
    with np.load(GOLDEN / f"greedy_{name}.npz") as file:
        return dict(file)


def prompts_of(golden: Arrays) -> list[Int32]:
    prompts: list[Int32] = np.split(golden["prompts"], np.cumsum(golden["prompt_lens"])[:-1])
    return prompts


def choices(program: Program, spec: DecoderSpec, prompt: Int32, tokens: Int32) -> Float32:
    """Logits [tokens, vocab] of every choice along a given continuation."""
    ids = np.concatenate([prompt, tokens[:-1]])
    return sequence_logits(program, spec, ids)[len(prompt) - 1 :]


def test_departures_from_float32_are_near_ties(
    model: PackedModel, golden: Arrays, program_factory: ProgramFactory
) -> None:
    """Along what float32 goes on with, another token is best only where the two best were closer than what rounding
    activations, keys and values moves a logit by."""
    spec = model.info.spec
    program = program_factory(spec, model.weights, num_blocks=NUM_BLOCKS, threads=available_cpus())
    departures, errors = [], []
    for prompt, tokens, top_ids, top_logits in zip(
        prompts_of(golden), golden["tokens"], golden["top_ids"], golden["top_logits"], strict=True
    ):
        logits = choices(program, spec, prompt, tokens)
        errors.append(np.take_along_axis(logits, top_ids, axis=1) - top_logits)
        wrong = np.flatnonzero(logits.argmax(axis=1) != tokens)
        departures += (top_logits[wrong, 0] - top_logits[wrong, 1]).tolist()
    error = np.abs(
        np.concatenate(errors) - np.concatenate(errors).mean(axis=1, keepdims=True)
    )  # a common shift is none
    allowed = 2 * float(np.quantile(error, 0.99))  # both logits may be off
    print(f"{len(departures)} departures of {golden['tokens'].size}, gaps {departures}, allowed {allowed:.3f}")
    assert len(departures) <= golden["tokens"].size // 20
    assert max(departures, default=0.0) < allowed < 1.0


@pytest.mark.full
def test_native_builds_go_on_as_the_twin_does(model: PackedModel, golden: Arrays, make_program: ProgramFactory) -> None:
    """Token by token, all prompts in one batch, on the best build."""
    spec = model.info.spec
    isa = available_isas()[0]
    prompts, steps = prompts_of(golden), golden["tokens"].shape[1]
    program = make_program(spec, model.weights, num_blocks=NUM_BLOCKS * len(prompts), threads=available_cpus(), isa=isa)
    blocks = [range(NUM_BLOCKS * i, NUM_BLOCKS * (i + 1)) for i in range(len(prompts))]
    pieces = [Piece(prompt.tolist(), 0, blocks[i]) for i, prompt in enumerate(prompts)]
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in range(steps):
        ends = np.cumsum([len(piece.token_ids) for piece in pieces]) - 1
        batch = make_batch(pieces, spec, rows=ends.tolist())
        program.step(batch)
        for i, chosen in enumerate(logits_of(batch).argmax(axis=1).tolist()):
            tokens[i].append(chosen)
            pieces[i] = Piece([chosen], pieces[i].end, blocks[i])
    twin = ReferenceProgram(spec, model.weights, num_blocks=NUM_BLOCKS)
    for prompt, own in zip(prompts, tokens, strict=True):
        assert choices(twin, spec, prompt, np.array(own, np.int32)).argmax(axis=1).tolist() == own
