from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import BATCH_TOKENS, SHARED_BATCH_TOKENS, Embedder, Turns
from engine.errors import RequestError
from engine.kernels.batch import TextBatch
from engine.models.spec import EncoderSpec, ModelInfo
from engine.request import Embedded, EmbedRequest, TextInput

LAYERS = 3
BAD = 99
"""A token that makes the program fail."""


class FakeEncoder:
    """The vector of a text is its number of tokens, their sum and the sum of their types."""

    isa = "fake"
    max_tokens = BATCH_TOKENS

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []  # the texts of each
        self.closed = False
        self._batch: TextBatch | None = None

    def begin(self, batch: TextBatch) -> None:
        self._batch, self._layer = batch, 0
        self.batches.append([ids.tolist() for ids in np.split(batch.token_ids, batch.starts[1:-1])])

    def run(self, layers: int) -> bool:
        assert layers == 1 and self._batch is not None
        self._layer += 1
        if BAD in self._batch.token_ids:
            raise RuntimeError("the kernel failed")
        if self._layer < LAYERS:
            return False
        for i, (begin, end) in enumerate(zip(self._batch.starts, self._batch.starts[1:], strict=False)):
            ids, types = self._batch.token_ids[begin:end], self._batch.types[begin:end]
            self._batch.out[i, :3] = len(ids), ids.sum(), types.sum()
        self._batch = None
        return True

    def close(self) -> None:
        self.closed = True


class FakeModel:
    name = "fake"
    weights: dict[str, Any] = {}

    def __init__(self, **spec: Any) -> None:
        sizes = {"num_layers": LAYERS, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
        self.info = ModelInfo(
            EncoderSpec("bert", **(sizes | {"vocab_size": 100, "max_position": 600, "norm_eps": 1e-5} | spec)),
            tokenizer_json="",
            chat_template=None,
            bos_token_id=None,
            eos_token_ids=(),
            add_bos=False,
        )


def make(**spec: Any) -> tuple[Embedder, FakeEncoder]:
    program, model = FakeEncoder(), FakeModel(**spec)
    ticks = iter(range(1_000_000))
    embedder = Embedder(
        model,  # type: ignore[arg-type]
        EngineConfig(threads=1),
        memory=1 << 30,
        create=lambda *_, **__: program,
        clock=lambda: float(next(ticks)),
    )
    return embedder, program


def texts(request_id: str, *inputs: list[int], **fields: Any) -> EmbedRequest:
    return EmbedRequest(request_id=request_id, model="fake", inputs=[TextInput(ids) for ids in inputs], **fields)


def drain(embedder: Embedder, **how: Any) -> dict[str, Embedded]:
    ended: dict[str, Embedded] = {}
    while embedder.has_work:
        ended |= {each.request_id: each for each in embedder.advance(**how)}
        embedder.check_integrity()
    return ended


def vectors(embedded: Embedded) -> list[list[float]]:
    assert embedded.error is None
    found: list[list[float]] = np.frombuffer(embedded.data, "<f4").reshape(-1, 32)[:, :3].tolist()
    return found


def test_a_piece_is_one_layer() -> None:
    embedder, _ = make()
    embedder.add(texts("a", [1, 2], [3]))
    for _ in range(LAYERS - 1):
        assert embedder.advance() == [] and embedder.has_work
    (ended,) = embedder.advance()
    assert vectors(ended) == [[2, 3, 0], [1, 3, 0]]
    assert not embedder.has_work and embedder.advance() == []
    assert (embedder.num_texts, embedder.num_tokens, embedder.seconds) == (2, 3, LAYERS)


def test_texts_of_several_requests_share_a_batch() -> None:
    embedder, program = make()
    embedder.add(texts("a", [1], [2]))
    embedder.add(texts("b", [3]))
    ended = drain(embedder)
    assert program.batches == [[[1], [2], [3]]]
    assert {name: vectors(each) for name, each in ended.items()} == {"a": [[1, 1, 0], [1, 2, 0]], "b": [[1, 3, 0]]}


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_keeps_its_budget_but_takes_one_text_at_least(shared: bool) -> None:
    budget = SHARED_BATCH_TOKENS if shared else BATCH_TOKENS
    embedder, program = make()
    half = [7] * (budget // 2)
    embedder.add(texts("a", half, half, [1], [5] * 600, [2]))
    ended = drain(embedder, shared=shared)
    assert [[len(text) for text in batch] for batch in program.batches] == [[budget // 2] * 2, [1], [600], [1]]
    assert [vector[0] for vector in vectors(ended["a"])] == [budget // 2, budget // 2, 1, 600, 1]


def test_the_lowest_priority_goes_first_and_equals_in_order() -> None:
    embedder, program = make()
    long = [1] * BATCH_TOKENS
    embedder.add(texts("late", long, priority=1))
    embedder.add(texts("first", [2] * BATCH_TOKENS))
    embedder.add(texts("second", [3] * BATCH_TOKENS))
    drain(embedder)
    assert [batch[0][0] for batch in program.batches] == [2, 3, 1]


def test_a_higher_priority_passes_between_the_batches_of_a_request() -> None:
    embedder, program = make()
    embedder.add(texts("library", [1] * BATCH_TOKENS, [2] * BATCH_TOKENS, priority=1))
    embedder.advance()
    embedder.add(texts("question", [3]))
    drain(embedder)
    assert [batch[0][0] for batch in program.batches] == [1, 3, 2]


def test_what_is_aborted_never_comes_out_and_harms_nobody() -> None:
    embedder, program = make()
    embedder.add(texts("a", [1], [2] * BATCH_TOKENS))
    embedder.add(texts("b", [3]))
    embedder.advance()
    embedder.abort("a")
    embedder.abort("never was")
    assert list(drain(embedder)) == ["b"]
    assert program.batches == [[[1]], [[3]]]
    embedder.add(texts("a", [4]))  # its id may be used again
    assert vectors(drain(embedder)["a"]) == [[1, 4, 0]]


def test_a_batch_of_aborted_requests_alone_is_given_up() -> None:
    embedder, program = make()
    embedder.add(texts("a", [1]))
    embedder.advance()
    embedder.abort("a")
    assert not embedder.has_work
    embedder.add(texts("b", [2]))
    assert list(drain(embedder)) == ["b"] and program.batches == [[[1]], [[2]]]


def test_a_failed_batch_fails_its_requests_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    embedder, _ = make()
    embedder.add(texts("bad", [BAD]))
    embedder.add(texts("beside", [1]))
    (*ended,) = embedder.advance()
    assert [each.request_id for each in ended] == ["bad", "beside"]
    assert {each.error for each in ended} == {"RuntimeError: the kernel failed"}
    assert "a batch of the encoder failed" in caplog.text
    embedder.add(texts("after", [2]))
    assert vectors(drain(embedder)["after"]) == [[1, 2, 0]]


def test_a_second_text_has_tokens_of_another_type() -> None:
    embedder, _ = make()
    embedder.add(EmbedRequest(request_id="a", model="fake", inputs=[TextInput([1, 2, 3], 1), TextInput([4])]))
    assert vectors(drain(embedder)["a"]) == [[3, 6, 2], [1, 4, 0]]


@pytest.mark.parametrize(
    "request_, said",
    [
        (EmbedRequest(request_id="a", model="other", inputs=[TextInput([1])]), "model must be 'fake', got 'other'"),
        (texts("a"), "at least one text"),
        (texts("a", [1], []), "input 1 must have 1 to 600 tokens, got 0"),
        (texts("a", [1] * 601), "input 0 must have 1 to 600 tokens, got 601"),
        (texts("a", [1, 100]), r"input 0: token ids must be in \[0, 100\), got 100"),
        (texts("a", [-1]), "got -1"),
        (EmbedRequest(request_id="a", model="fake", inputs=[TextInput([1], 2)]), "must begin in it, got 2"),
        (texts("live", [1]), "'live' is in use"),
    ],
)
def test_what_cannot_be_is_refused(request_: EmbedRequest, said: str) -> None:
    embedder, _ = make()
    embedder.add(texts("live", [1]))
    with pytest.raises(RequestError, match=said):
        embedder.add(request_)
    assert list(drain(embedder)) == ["live"]


def test_one_type_of_tokens_knows_no_second_text() -> None:
    embedder, _ = make(num_types=1)
    with pytest.raises(RequestError, match="one type of tokens"):
        embedder.add(EmbedRequest(request_id="a", model="fake", inputs=[TextInput([1, 2], 1)]))


def test_closing_closes_the_program() -> None:
    embedder, program = make()
    embedder.close()
    assert program.closed


def test_an_encoder_s_share_of_a_decoder_s_time() -> None:
    turns, decoder, encoder = Turns(share=0.1), 0.0, 0.0
    for _ in range(10_000):
        turns.worked(0.004)
        decoder += 0.004
        if turns.may(0.003):
            turns.spend(0.003)
            encoder += 0.003
    assert 0.09 < encoder / decoder <= 0.1


def test_what_is_saved_beyond_a_piece_is_lost() -> None:
    turns = Turns(share=0.5)
    turns.worked(1000.0)
    assert turns.may(1.0)
    turns.spend(1.0)
    assert not turns.may(1.0)
    turns.worked(2.0)
    assert turns.may(1.0)
    turns.idle()
    assert not turns.may(1.0)
