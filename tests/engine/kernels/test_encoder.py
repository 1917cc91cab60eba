"""Encoders: transformers' vectors, the numpy twin's bits, and the same answer in any company."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.kernels import available_isas, create_encoder, create_program
from engine.kernels.batch import EncoderProgram, Float32, Int32, TextBatch
from engine.kernels.reference_encoder import ReferenceEncoder
from engine.models.spec import EncoderSpec
from engine.ranks import Ranks
from engine.weights import PackedModel, load_encoder, load_model
from tests.tiny_encoders import ENCODERS, digest_of, seed_of
from tests.tiny_gguf import write_tiny_llama

GOLDEN = Path(__file__).parents[2] / "golden" / "encoders.npz"
MEAN_COSINE = {"none": 0.9999, "int8": 0.999, "int4": 0.95}
MAX_TOKENS = 512
FUSED = [isa for isa in available_isas() if isa != "portable"]


@dataclass(frozen=True)
class Case:
    """A tiny encoder as one quantization packs it, and golden vectors of seven texts of 1 to 100 tokens."""

    model: PackedModel[EncoderSpec]
    quantization: str
    token_ids: Int32
    types: Int32
    starts: Int32
    golden: Float32

    @property
    def spec(self) -> EncoderSpec:
        return self.model.info.spec

    def vectors(self, program: EncoderProgram, texts: list[int] | None = None, layers: int = 99) -> Float32:
        """Of the golden texts, or of some of them in this order."""
        chosen = range(len(self.golden)) if texts is None else texts
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in chosen]
        starts = np.cumsum([0, *(span.stop - span.start for span in spans)]).astype(np.int32)
        out = np.full((len(spans), self.spec.output_size), np.nan, np.float32)
        program.begin(
            TextBatch(
                np.concatenate([self.token_ids[span] for span in spans]),
                np.concatenate([self.types[span] for span in spans]),
                starts,
                out,
            )
        )
        while not program.run(layers):
            pass
        return out

    def assert_near(self, vectors: Float32, cosine: float) -> None:
        """To what transformers computed: logits of all texts together, embeddings as a mean over texts."""
        ours, theirs = (vectors, self.golden) if not self.spec.num_labels else (vectors.T, self.golden.T)
        found = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        assert found.mean() >= cosine, found
        scale = np.linalg.norm(theirs, axis=1)
        assert np.allclose(np.linalg.norm(ours, axis=1), scale, rtol=3 * np.sqrt(1 - cosine) + 1e-5)


@pytest.fixture(scope="module", params=ENCODERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name: str = request.param
    return name, ENCODERS[name].write(tmp_path_factory.mktemp("encoder") / name, seed_of(name))


@pytest.fixture(scope="module", params=["none", "int8"])
def case(
    request: pytest.FixtureRequest, folder: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    yield from _case(request.param, folder, tmp_path_factory)


def _case(quantization: str, folder: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name, path = folder
    with np.load(GOLDEN) as file:
        golden = {key.removeprefix(f"{name}_"): file[key] for key in file if key.startswith(f"{name}_")}
        starts = file["starts"]
    assert digest_of(name) == golden["digest"], "other weights: run tests/golden/make_encoder_golden.py"
    model = load_encoder(str(path), home=tmp_path_factory.mktemp("home"), quantization=quantization)
    yield Case(model, quantization, golden["token_ids"], golden["types"], starts, golden["out"])
    model.close()


def reference(case: Case, **how: object) -> ReferenceEncoder:
    return ReferenceEncoder(case.spec, case.model.weights, max_tokens=MAX_TOKENS, **how)  # type: ignore[arg-type]


def native(case: Case, isa: str, threads: int = 1) -> EncoderProgram:
    return create_encoder(case.spec, case.model.weights, max_tokens=MAX_TOKENS, threads=threads, isa=isa)


def test_float32_is_what_transformers_computes(case: Case) -> None:
    if case.quantization == "none":  # weights of float32, rounded once to bfloat16
        case.assert_near(case.vectors(reference(case, activations="float32")), 0.99995)


@pytest.mark.parametrize("isa", [*available_isas(), "reference"])
def test_vectors_are_near_those_of_transformers(case: Case, isa: str) -> None:
    case.assert_near(case.vectors(native(case, isa)), MEAN_COSINE[case.quantization])


@pytest.mark.parametrize("isa", FUSED)
def test_native_builds_give_the_twin_s_bits(case: Case, isa: str) -> None:
    expected = case.vectors(reference(case))
    for threads in (1, 2):
        assert np.array_equal(case.vectors(native(case, isa, threads)), expected)


@pytest.mark.parametrize("isa", available_isas())
def test_a_text_s_vector_depends_on_nothing_beside_it(case: Case, isa: str) -> None:
    program = native(case, isa, 2)
    together = case.vectors(program)
    alone = np.concatenate([case.vectors(program, [i]) for i in range(len(together))])
    assert np.array_equal(alone, together)
    assert np.array_equal(case.vectors(program, [6, 0, 3, 6], layers=1), together[[6, 0, 3, 6]])


@pytest.mark.parametrize("isa", [*available_isas(), "reference"])
def test_a_batch_that_makes_no_sense_is_refused_and_the_one_before_goes_on(case: Case, isa: str) -> None:
    program = native(case, isa)
    size = case.spec.output_size
    out = np.zeros((2, size), np.float32)
    ids, types = np.array([5, 6, 7], np.int32), np.zeros(3, np.int32)
    good = TextBatch(ids, types, np.array([0, 1, 3], np.int32), out)
    expected = np.zeros_like(out)
    program.begin(TextBatch(ids, types, good.starts, expected))
    while not program.run(1):
        pass
    program.begin(good)
    program.run(1)

    def changed(**arrays: NDArray[np.generic]) -> TextBatch:
        fields = {"token_ids": ids, "types": types, "starts": good.starts, "out": np.zeros_like(out)}
        return TextBatch(**(fields | arrays))  # type: ignore[arg-type]

    long = case.spec.max_position + 1
    for batch, said in (
        (changed(token_ids=np.array([5, 6, case.spec.vocab_size], np.int32)), "token_ids: expected values in"),
        (changed(token_ids=np.array([5, -1, 7], np.int32)), "token_ids"),
        (changed(token_ids=ids.astype(np.int64)), "token_ids: expected int32"),
        (changed(types=np.array([0, 0, case.spec.num_types], np.int32)), "types"),
        (changed(types=types[:2]), "types"),
        (changed(starts=np.array([0, 0, 3], np.int32)), "starts: expected to rise"),
        (changed(starts=np.array([0, 4, 3], np.int32)), "starts"),
        (changed(starts=np.array([0, 1, 2], np.int32)), "starts"),
        (changed(starts=np.array([0], np.int32)), "at least 1 text"),
        (changed(out=np.zeros((1, size), np.float32)), "out"),
        (changed(out=np.zeros((2, size))), "out"),
        (
            TextBatch(
                np.zeros(long, np.int32), np.zeros(long, np.int32), np.array([0, long], np.int32), out[:1].copy()
            ),
            "starts",
        ),
        (
            TextBatch(
                np.zeros(MAX_TOKENS + 1, np.int32),
                np.zeros(MAX_TOKENS + 1, np.int32),
                np.array([0, MAX_TOKENS + 1], np.int32),
                out[:1].copy(),
            ),
            f"1 to {MAX_TOKENS} tokens",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            program.begin(batch)
    while not program.run(1):
        pass
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("isa", available_isas())
def test_on_the_threads_of_a_decoder_s_ranks_it_gives_the_same(
    case: Case, isa: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("decoder")
    write_tiny_llama(folder / "tiny.gguf")
    model = load_model(str(folder / "tiny.gguf"), home=folder)
    ranks = Ranks(threads=(1, 2), cpus=((), ()))
    decoder = create_program(model.info.spec, model.weights, num_blocks=4, ranks=ranks, isa=isa)
    encoder = create_encoder(case.spec, case.model.weights, max_tokens=MAX_TOKENS, isa=isa, beside=decoder)
    assert np.array_equal(case.vectors(encoder, layers=1), case.vectors(native(case, isa)))
    decoder.close()
    with pytest.raises(RuntimeError, match="closed"):
        case.vectors(encoder)
    encoder.close()
    model.close()


def test_a_program_has_room_for_the_longest_text(case: Case) -> None:
    with pytest.raises(ValueError, match="room for a text of 100 tokens and at least 1 thread, got 99 and 1"):
        create_encoder(case.spec, case.model.weights, max_tokens=99, isa=available_isas()[0])


def test_a_closed_program_computes_nothing(case: Case) -> None:
    program = native(case, available_isas()[0])
    program.close()
    program.close()
    with pytest.raises(RuntimeError, match="closed"):
        case.vectors(program)
