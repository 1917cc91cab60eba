"""Logits and likelihoods against an independent float32 implementation; tests/golden says where they are from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.perplexity import perplexity, windows_nll
from engine.config import KV_DTYPES, available_cpus
from engine.kernels import available_isas
from engine.kernels.batch import Float32, Program
from engine.kernels.native import build, native_logprobs
from engine.kernels.reference import ReferenceProgram
from engine.kernels.selftest import logprob_arrays
from engine.models.spec import DecoderSpec
from engine.weights import PackedModel, load_model
from engine.weights.tensor_types import FLOAT_TYPES, QUANTIZED_TYPES
from tests.engine.kernels.conftest import ProgramFactory
from tests.engine.kernels.steps import cosines, random_weights, sequence_logits, tiny_spec
from tests.golden.checkpoints import CHECKPOINTS, weights_digest, write_checkpoint

GOLDEN = Path(__file__).parents[2] / "golden"
TINY_BLOCKS = 3  # 70 tokens
DEFAULT_BLOCKS = 2  # the longest prompt

ROUNDED = {"F32": 0.99995, "F16": 0.99995, "Q4_K": 0.99999, "Q5_K": 0.99999, "Q6_K": 0.9998}
"""Types whose weights are rounded on their way into our layouts, and the cosine that remains of exact arithmetic with
the rounded weights. All others are carried over exactly."""

Arrays = dict[str, NDArray[Any]]


def load(name: str) -> Arrays:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint, loaded from its GGUF file, and its golden arrays."""

    name: str
    model: PackedModel
    golden: Arrays

    @property
    def spec(self) -> DecoderSpec:
        return self.model.info.spec

    @property
    def min_cosine(self) -> float:
        """What the arithmetic of serving may lose, as a mean over positions: activations keep 8 bits before quantized
        matrices and all of theirs before bfloat16 ones."""
        matrices = [tensor.format for tensor in self.model.weights.values() if tensor.format is not None]
        return 0.999 if any(fmt.is_quantized for fmt in matrices) else 0.9999

    def logits(self, program: Program) -> Float32:
        """At every position, float32 [tokens, vocab]."""
        return sequence_logits(program, self.spec, self.golden["token_ids"])

    @cached_property
    def twin_logits(self) -> Float32:
        return self.logits(ReferenceProgram(self.spec, self.model.weights, num_blocks=TINY_BLOCKS))

    def cosine(self, logits: Float32) -> float:
        """The mean over the golden positions."""
        return float(cosines(logits[self.golden["positions"]], self.golden["logits"]).mean())


@pytest.fixture(scope="module", params=CHECKPOINTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    path = write_checkpoint(folder, request.param)
    golden = load(f"tiny_{request.param}")
    assert weights_digest(path) == golden["weights_digest"], (
        "the seed no longer gives the weights that the golden logits were computed with: "
        "run tests/golden/make_golden.py --tiny"
    )
    return Tiny(request.param, load_model(str(path), home=folder), golden)


@pytest.fixture(scope="module")
def default_golden() -> Arrays:
    return load("default_logits")


@pytest.fixture(scope="module")
def default_exact_logits(default_model: PackedModel, default_golden: Arrays) -> Float32:
    """Float32 arithmetic in numpy at every position of the golden prompts."""
    spec = default_model.info.spec
    program = ReferenceProgram(
        spec, default_model.weights, num_blocks=DEFAULT_BLOCKS, activations="float32", kv_dtype="float32"
    )
    return default_logits(program, spec, default_golden)


def default_logits(program: Program, spec: DecoderSpec, golden: Arrays) -> Float32:
    """Logits of every golden prompt, one after another."""
    prompts = np.split(golden["token_ids"], np.cumsum(golden["prompt_lens"])[:-1])
    return np.concatenate([sequence_logits(program, spec, prompt) for prompt in prompts])


def full_rows(logits: Float32, golden: Arrays) -> Float32:
    return logits[golden["full_positions"]]


def test_every_type_has_a_golden_checkpoint() -> None:
    stored = {kind for shape in CHECKPOINTS.values() for kind in (shape.quant, *shape.mix.values())}
    assert stored == FLOAT_TYPES.keys() | QUANTIZED_TYPES.keys()
    assert {path.stem for path in GOLDEN.glob("tiny_*.npz")} == {f"tiny_{name}" for name in CHECKPOINTS}


def test_tiny_float32_reference(tiny: Tiny) -> None:
    """Nothing but the rounding of weights to our layouts, where their type has one, parts us from transformers."""
    program = ReferenceProgram(
        tiny.spec, tiny.model.weights, num_blocks=TINY_BLOCKS, activations="float32", kv_dtype="float32"
    )
    logits = tiny.logits(program)
    shape = CHECKPOINTS[tiny.name]
    floors = [ROUNDED[kind] for kind in (shape.quant, *shape.mix.values()) if kind in ROUNDED]
    if floors:
        assert tiny.cosine(logits) >= min(floors)
    else:
        np.testing.assert_allclose(logits[tiny.golden["positions"]], tiny.golden["logits"], atol=5e-5)


def test_tiny_twin(tiny: Tiny) -> None:
    assert tiny.cosine(tiny.twin_logits) >= tiny.min_cosine


def test_tiny_native(tiny: Tiny, program_factory: ProgramFactory) -> None:
    program = program_factory(tiny.spec, tiny.model.weights, num_blocks=TINY_BLOCKS)
    native = tiny.logits(program)
    assert tiny.cosine(native) >= tiny.min_cosine
    if program.isa == "portable":  # without fused multiply-adds
        assert cosines(native, tiny.twin_logits).mean() >= 0.9999
    else:
        np.testing.assert_array_equal(native, tiny.twin_logits)


def test_default_float32_reference(default_exact_logits: Float32, default_golden: Arrays) -> None:
    logits = default_exact_logits
    expected = default_golden["full_logits"].astype(np.float32)
    assert cosines(full_rows(logits, default_golden), expected).min() >= 0.99999
    # At every position, the probabilities of the likeliest tokens.
    top = np.take_along_axis(logits, default_golden["top_ids"], axis=1)
    logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    np.testing.assert_allclose(top, default_golden["top_logits"], atol=2e-3)
    np.testing.assert_allclose(logsumexp, default_golden["logsumexp"], atol=2e-3)


def test_default_logprobs(default_exact_logits: Float32, default_golden: Arrays) -> None:
    """Every build's log-probabilities of the 20 likeliest tokens at every position, in float32 until there."""
    expected = (default_golden["top_logits"] - default_golden["logsumexp"][:, None])[:, :20]
    targets = default_golden["top_ids"][:, 19].astype(np.int32)
    for isa in available_isas():
        module, wanted = build(isa), logprob_arrays(targets, 20)
        assert module is not None
        module.logprobs(default_exact_logits, native_logprobs(module, wanted))
        np.testing.assert_allclose(wanted.logprobs[:, 1:], expected, atol=2e-3)
        np.testing.assert_allclose(wanted.logprobs[:, 0], expected[:, 19], atol=2e-3)


def test_default_native(default_model: PackedModel, default_golden: Arrays, program_factory: ProgramFactory) -> None:
    spec = default_model.info.spec
    program = program_factory(spec, default_model.weights, num_blocks=DEFAULT_BLOCKS, threads=available_cpus())
    logits = full_rows(default_logits(program, spec, default_golden), default_golden)
    assert cosines(logits, default_golden["full_logits"].astype(np.float32)).mean() >= 0.999


def test_default_native_at_every_position(
    default_model: PackedModel,
    default_golden: Arrays,
    default_exact_logits: Float32,
    program_factory: ProgramFactory,
) -> None:
    """Against float32 at every position of the prompts: the numpy logits, which the golden ones hold to 1e-5."""
    spec = default_model.info.spec
    program = program_factory(spec, default_model.weights, num_blocks=DEFAULT_BLOCKS, threads=available_cpus())
    native = default_logits(program, spec, default_golden)
    assert len(native) >= 128
    assert cosines(native, default_exact_logits).mean() >= 0.999


def test_default_twin(default_model: PackedModel, default_golden: Arrays, make_program: ProgramFactory) -> None:
    """The best native build gives the twin's bits through all layers, so what holds of one holds of the other."""
    spec = default_model.info.spec
    prompt = default_golden["token_ids"][: default_golden["prompt_lens"][0]]
    twin = sequence_logits(ReferenceProgram(spec, default_model.weights, num_blocks=DEFAULT_BLOCKS), spec, prompt)
    program = make_program(
        spec, default_model.weights, num_blocks=DEFAULT_BLOCKS, threads=available_cpus(), isa=available_isas()[0]
    )
    native = sequence_logits(program, spec, prompt)
    if program.isa == "portable":
        # Without fused multiply-adds the two drift apart as far as 8-bit activations are from float32.
        assert cosines(native, twin).mean() >= 0.998
    else:
        np.testing.assert_array_equal(native, twin)


@pytest.mark.full  # one window of it is in tests/engine/test_logprobs.py
def test_default_perplexity(default_model: PackedModel, make_program: ProgramFactory) -> None:
    """Within 0.5 % of float32 over the whole text, on the best build; keys and values of 8 bits cost at most 0.2 %."""
    golden = load("default_perplexity")
    token_ids, window = golden["token_ids"], int(golden["window"])
    assert len(token_ids) >= 20_000
    spec = default_model.info.spec
    how = {"num_blocks": -(-window // 32), "threads": available_cpus(), "isa": available_isas()[0]}
    bf16, int8 = (
        perplexity(make_program(spec, default_model.weights, kv_dtype=dtype, **how), spec, token_ids, window)
        for dtype in KV_DTYPES
    )
    assert bf16 == pytest.approx(math.exp(np.average(golden["nll"], weights=golden["counts"])), rel=0.005)
    assert bf16 != int8 == pytest.approx(bf16, rel=0.002)


def test_the_perplexity_text_is_the_one_that_was_measured(default_model: PackedModel) -> None:
    tokenizer = Tokenizer.from_str(default_model.info.tokenizer_json)
    text = (GOLDEN / "perplexity.txt").read_text(encoding="utf-8")
    assert tokenizer.encode(text, add_special_tokens=False).ids == load("default_perplexity")["token_ids"].tolist()


def test_perplexity_of_windows_is_that_of_their_logits() -> None:
    """The measure itself, against a softmax written out, with a short last window and several chunks."""
    spec = tiny_spec()
    program = ReferenceProgram(spec, random_weights(spec), num_blocks=10)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, 320 + 5)
    measured = windows_nll(program, spec, ids, 320)
    assert [count for _, count in measured] == [319, 4]
    for (total, _), window in zip(measured, (ids[:320], ids[320:]), strict=True):
        logits = sequence_logits(program, spec, window.astype(np.int32)).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert total == pytest.approx(-logprobs[np.arange(len(window) - 1), window[1:]].sum(), rel=1e-6)
    total = sum(nll for nll, _ in measured)
    assert perplexity(program, spec, ids, 320) == pytest.approx(math.exp(total / 323))
    with pytest.raises(ValueError, match="needs 11 KV blocks, got 10"):
        perplexity(program, spec, ids, 321)
    with pytest.raises(ValueError, match="at least 2 tokens, got 320 and 1"):
        perplexity(program, spec, ids[:1], 320)
