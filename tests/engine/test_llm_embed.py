"""Embeddings offline: the catalogue's encoder beside its reference, and tiny ones for what it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine import LLM
from engine.errors import ConfigError, EngineError, RequestError, UnsupportedModelError
from engine.weights import load_encoder, load_model
from tests.golden.retrieval import ODD, PASSAGES, QUESTIONS
from tests.tiny_encoders import ENCODERS, seed_of, write_modules

GOLDEN = Path(__file__).parents[1] / "golden" / "minilm.npz"
TEXTS = (*PASSAGES, *(question for question, _ in QUESTIONS), *ODD)
NAME = "all-minilm-l6-v2"

ROUNDING = 0.008
"""What rounding to 8 bits moves a similarity of two embeddings by, at most, in this set."""


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    with LLM(NAME, progress=False) as llm:
        yield llm


def tiny(name: str, folder: Path, **config: Any) -> LLM:
    path = ENCODERS[name].write(folder / name, seed_of(name))
    return LLM(str(path), home=folder / "home", progress=False, threads=1, **config)


def test_minilm_reads_the_ids_that_its_own_tokenizer_gives(minilm: LLM, golden: dict[str, NDArray[Any]]) -> None:
    assert minilm._encoder_text is not None
    inputs = minilm._encoder_text.encode_texts(TEXTS)
    expected = np.split(golden["token_ids"], golden["starts"][1:-1])
    assert [text.token_ids for text in inputs] == [ids.tolist() for ids in expected]


def test_minilm_s_embeddings_are_the_reference_s(minilm: LLM, golden: dict[str, NDArray[Any]]) -> None:
    cosines = (minilm.embed(TEXTS, progress=False) * golden["vectors"]).sum(axis=1)
    sentences = len(PASSAGES) + len(QUESTIONS)
    assert cosines[:sentences].min() >= 0.999
    assert cosines.mean() >= 0.9995
    assert cosines.min() >= 0.998  # the empty text, two special tokens


def test_minilm_ranks_as_the_reference(minilm: LLM, golden: dict[str, NDArray[Any]]) -> None:
    def scores(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        passages, questions = np.split(vectors, [len(PASSAGES), len(PASSAGES) + len(QUESTIONS)])[:2]
        similarities: NDArray[np.float32] = questions @ passages.T
        return similarities

    ours, theirs = scores(minilm.embed(TEXTS, progress=False)), scores(golden["vectors"])
    assert np.array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    assert np.mean(ours.argmax(axis=1) == [answer for _, answer in QUESTIONS]) >= 0.96
    assert np.abs(ours - theirs).max() <= ROUNDING
    # Two passages change places only where the reference itself has them that close together.
    apart = theirs[:, :, None] - theirs[:, None, :] > 2 * ROUNDING
    assert (ours[:, :, None] > ours[:, None, :])[apart].all()


def test_bfloat16_weights_rank_the_first_five_as_the_reference(golden: dict[str, NDArray[Any]]) -> None:
    with LLM(NAME, quantization="none", progress=False) as llm:
        ours = llm.embed(TEXTS, progress=False)
    assert (ours * golden["vectors"]).sum(axis=1).min() >= 0.9999
    passages, questions = slice(0, len(PASSAGES)), slice(len(PASSAGES), len(PASSAGES) + len(QUESTIONS))
    first, theirs = (np.argsort(-(v[questions] @ v[passages].T))[:, :5] for v in (ours, golden["vectors"]))
    assert np.array_equal(first, theirs)


def test_an_encoder_beside_a_decoder_embeds_the_same(minilm: LLM) -> None:
    with LLM(embedding_model=NAME, progress=False, kv_cache_tokens=512) as llm:
        before = llm.generate("The capital of France is", progress=False)
        assert np.array_equal(llm.embed(TEXTS, progress=False), minilm.embed(TEXTS, progress=False))
        assert llm.generate("The capital of France is", progress=False)[0].text == before[0].text


def test_one_text_many_and_none(tmp_path: Path) -> None:
    with tiny("minilm", tmp_path) as llm:
        many = llm.embed([f"the river {i}" for i in range(600)], progress=False)
        assert many.shape == (600, 96) and np.allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
        assert np.array_equal(llm.embed("the river 7"), many[7:8])
        assert llm.embed([]).shape == (0, 96)


def test_a_long_text_is_refused_or_cut_before_its_end_token(tmp_path: Path) -> None:
    with tiny("minilm", tmp_path) as llm:
        long = "water " * 200
        with pytest.raises(RequestError, match="input 1 must have 1 to 100 tokens, got 202") as caught:
            llm.embed(["a", long], progress=False)
        assert caught.value.code == "context_length_exceeded"
        cut = llm.embed(long, truncate=True, progress=False)
        assert np.array_equal(cut, llm.embed("water " * 98, progress=False))
        llm._core.check_integrity()  # type: ignore[union-attr]
        assert not llm._embedded and not llm._core.has_work  # type: ignore[union-attr]


def test_the_modules_may_say_less_than_there_are_positions(tmp_path: Path) -> None:
    path = ENCODERS["minilm"].write(tmp_path / "short", 1)
    write_modules(path, "mean", normalize=True, max_length=10)
    with LLM(str(path), home=tmp_path, progress=False) as llm:
        with pytest.raises(RequestError, match="1 to 10 tokens"):
            llm.embed("water " * 9, progress=False)
        assert llm.embed("water " * 8, progress=False).shape == (1, 96)


def test_a_cross_encoder_scores(tmp_path: Path) -> None:
    with tiny("cross", tmp_path) as llm:
        scores = llm.score("what is water", ["the river", "bread", "a mountain of bread"], progress=False)
        assert scores.shape == (3,) and ((scores > 0) & (scores < 1)).all() and len(set(scores.tolist())) == 3
        assert llm.score("what is water", "bread", progress=False)[0] == scores[1]
        with pytest.raises(RequestError, match="scores pairs of texts: it cannot embed"):
            llm.embed("a", progress=False)


def test_what_a_model_is_not_for(tmp_path: Path) -> None:
    with tiny("classes", tmp_path) as llm, pytest.raises(RequestError, match="3 classes, it scores nothing"):
        llm.score("a", ["b"], progress=False)
    with tiny("bge", tmp_path) as llm:
        with pytest.raises(RequestError, match="it cannot score"):
            llm.score("a", ["b"], progress=False)
        with pytest.raises(RequestError, match="makes vectors of texts and continues none"):
            llm.generate("a")
        with pytest.raises(RequestError, match="makes vectors of texts and continues none"):
            llm.chat([{"role": "user", "content": "a"}])
    with pytest.raises(EngineError, match="closed"):
        llm.embed("a", progress=False)
    with LLM(progress=False, kv_cache_tokens=512) as decoder, pytest.raises(RequestError, match="is no encoder"):
        decoder.embed("a", progress=False)


def test_a_model_of_the_other_kind_is_named(tmp_path: Path) -> None:
    path = str(ENCODERS["bge"].write(tmp_path / "bge", 1))
    with pytest.raises(UnsupportedModelError, match=r"bge is an encoder .* A decoder is expected"):
        load_model(path, home=tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"smollm2-135m-instruct is a decoder .* as all-minilm-l6-v2"):
        load_encoder("smollm2-135m-instruct")
    with pytest.raises(ConfigError, match="goes with a decoder, and bge is an encoder"):
        LLM(path, home=tmp_path, embedding_model=path, progress=False)
