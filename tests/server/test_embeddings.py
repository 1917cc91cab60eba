"""POST /v1/embeddings, /v1/score and /v1/rerank over a scripted engine."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import EngineDeadError
from engine.request import EmbedRequest, EncoderInfo, TextInput
from engine.text import EncoderText, Tokenizer
from server.app import create_app
from server.kinds import Kind
from server.registry import ServedModel
from tests.server.fakes import FakeEngine
from tests.server.support import Client, served, settings
from tests.tiny_encoders import VOCAB, VOCAB_SIZE, tokenizer_json

MAX_LEN = 20
CLS, SEP = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")
THE, RIVER = VOCAB.index("the"), VOCAB.index("river")


def unit(request: EmbedRequest) -> NDArray[np.float32]:
    """Vectors of length 1 that differ."""
    rows = np.array([[len(text.token_ids), sum(text.token_ids), 1, 2] for text in request.inputs], np.float32)
    vectors: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return vectors


def logits(request: EmbedRequest) -> NDArray[np.float32]:
    """The more tokens a pair has, the better."""
    return np.array([[len(text.token_ids) - 6] for text in request.inputs], np.float32)


@asynccontextmanager
async def client_of(
    kind: Kind = Kind.EMBED, engine: FakeEngine | None = None, *, labels: int = 0, **changes: Any
) -> AsyncIterator[tuple[Client, FakeEngine]]:
    """A client of an application with a decoder m and an encoder e that lives beside it."""
    engine = engine or FakeEngine()
    engine.encoder = EncoderInfo(
        model="encoder", output_size=labels or 4, max_input_len=MAX_LEN, vocab_size=VOCAB_SIZE, num_labels=labels
    )
    configured = settings(model=("m",), embedding_model="e", **changes)
    text = EncoderText(Tokenizer(tokenizer_json(pairs_have_types=True), vocab_size=VOCAB_SIZE), MAX_LEN)
    encoder = ServedModel(names=("e",), source="e", engine=engine, text=text, kind=kind, host="m")
    app = create_app(configured, [served(engine, configured), encoder])
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        await until(lambda: app.state.service.started)
        yield client, engine


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - another task makes it true
            await asyncio.sleep(0)


async def embed(client: Client, given: Any, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/embeddings", json={"model": "e", "input": given, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refusal(client: Client, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
    response = await client.post(path, json={"model": "e", **body})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


async def test_a_text_and_a_list_of_texts() -> None:
    async with client_of() as (client, engine):
        one = await embed(client, "the river")
        assert one == {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [4, CLS + SEP + THE + RIVER, 0, 0]}],
            "model": "e",
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        }
        many = await embed(client, ["the", "the river", "a"])
        assert [each["index"] for each in many["data"]] == [0, 1, 2]
        assert [each["embedding"][0] for each in many["data"]] == [3, 4, 3]
        assert many["usage"]["prompt_tokens"] == 10
        assert [request.model for request in engine.embeddings] == ["encoder", "encoder"]


async def test_token_ids_are_taken_as_they_are() -> None:
    async with client_of() as (client, engine):
        assert (await embed(client, [THE, RIVER]))["usage"]["prompt_tokens"] == 2
        await embed(client, [[THE], [CLS, RIVER, SEP]])
        assert [request.inputs for request in engine.embeddings] == [
            [TextInput([THE, RIVER])],
            [TextInput([THE]), TextInput([CLS, RIVER, SEP])],
        ]


async def test_base64_is_the_bytes_of_float32() -> None:
    async with client_of() as (client, _):
        floats = await embed(client, ["the", "a river"], encoding_format="float")
        coded = await embed(client, ["the", "a river"], encoding_format="base64")
        for one, other in zip(floats["data"], coded["data"], strict=True):
            assert np.frombuffer(base64.b64decode(other["embedding"]), "<f4").tolist() == one["embedding"]


async def test_dimensions_cut_vectors_and_keep_their_length() -> None:
    engine = FakeEngine()
    async with client_of(engine=engine) as (client, _):
        engine.embedding = unit
        whole = (await embed(client, "the river"))["data"][0]["embedding"]
        cut = (await embed(client, "the river", dimensions=2))["data"][0]["embedding"]
        assert len(cut) == 2 and np.isclose(np.linalg.norm(cut), 1)
        assert np.allclose(np.array(cut) / cut[0], np.array(whole[:2]) / whole[0])
        assert (await embed(client, "the river", dimensions=4))["data"][0]["embedding"] == whole
        error = await refusal(client, "/v1/embeddings", {"input": "the", "dimensions": 5})
        assert (error["param"], "at most 4" in error["message"]) == ("dimensions", True)
        engine.embedding = lambda request: 3 * unit(request)
        assert np.linalg.norm((await embed(client, "the", dimensions=2))["data"][0]["embedding"]) != pytest.approx(1)


async def test_token_ids_outside_the_vocabulary_say_how_to_make_langchain_send_text() -> None:
    async with client_of() as (client, engine):
        error = await refusal(client, "/v1/embeddings", {"input": [[5], [100257]]})
        assert "100257" in error["message"] and f"0 to {VOCAB_SIZE - 1}" in error["message"]
        assert "check_embedding_ctx_length=False" in error["message"]
        assert (error["param"], error["code"]) == ("input", "invalid_token_ids")
        assert not engine.embeddings


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "input", "input"),
        ({"input": ""}, "input", "input 0 is empty"),
        ({"input": []}, "input", "1 to 2048 texts, got 0"),
        ({"input": ["a", ""]}, "input", "input 1 is empty"),
        ({"input": [[1], []]}, "input", "input 1 is empty"),
        ({"input": ["a"] * 2049}, "input", "got 2049"),
        ({"input": 5}, "input", "must be a text, a list of texts, token ids"),
        ({"input": ["a", 5]}, "input", "must be a text, a list of texts"),
        ({"input": [1.5]}, "input", "must be a text, a list of texts"),
        ({"input": {"text": "a"}}, "input", "must be a text, a list of texts"),
        ({"input": "water " * 30}, "input", "input 0 must have 1 to 20 tokens, got 32"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions", "dimensions"),
        ({"input": "a", "dimensions": "4"}, "dimensions", "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or from 1 to 20"),
        ({"input": [5], "truncate_prompt_tokens": 3}, "truncate_prompt_tokens", "token ids are taken as they are"),
        ({"input": "a", "priority": 1 << 31}, "priority", "priority"),
        ({"input": "a", "normalize": False}, "normalize", "normalize is not supported"),
        ({"input": "a", "messages": []}, "messages", "messages is not supported"),
    ],
)
async def test_what_cannot_be_embedded(body: dict[str, Any], param: str, said: str) -> None:
    async with client_of() as (client, engine):
        error = await refusal(client, "/v1/embeddings", body)
        assert error["param"] == param and said in error["message"]
        assert not engine.embeddings


async def test_truncation_is_asked_for() -> None:
    async with client_of() as (client, engine):
        await embed(client, "water " * 30, truncate_prompt_tokens=5)
        await embed(client, ["water " * 30, "the"], truncate_prompt_tokens=-1, priority=3)
        assert [len(text.token_ids) for request in engine.embeddings for text in request.inputs] == [5, 20, 3]
        assert [request.priority for request in engine.embeddings] == [0, 3]


async def test_priorities_that_the_engine_lacks() -> None:
    async with client_of() as (client, engine):
        engine.features -= {"priority"}
        response = await client.post("/v1/embeddings", json={"model": "e", "input": "the", "priority": 3})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "not_supported_by_engine", "priority")
        assert engine.embeddings == []


async def test_models_of_the_other_kinds_say_what_they_are() -> None:
    async with client_of() as (client, _):
        for path, body, said in (
            ("/v1/embeddings", {"model": "m", "input": "a"}, "'m' does not support embeddings: it is a language model"),
            ("/v1/completions", {"prompt": "a"}, "'e' does not support completions: it is an embedding model"),
            ("/v1/score", {"text_1": "a", "text_2": "b"}, "does not support scores: it is an embedding model"),
            ("/v1/rerank", {"query": "a", "documents": ["b"]}, "does not support reranking"),
        ):
            error = await refusal(client, path, body)
            assert said in error["message"] and error["code"] == "model_not_supported"
        assert (
            "this server has m, e"
            in (await refusal(client, "/v1/embeddings", {"model": "x", "input": "a"}, 404))["message"]
        )


async def test_the_encoder_s_own_limits_are_listed() -> None:
    async with client_of() as (client, _):
        models = {each["id"]: each for each in (await client.get("/v1/models")).json()["data"]}
        assert (models["e"]["kind"], models["e"]["max_model_len"]) == ("embed", MAX_LEN)
        assert (models["m"]["kind"], models["m"]["max_model_len"]) == ("generate", 64)
        counted = await client.post("/tokenize", json={"model": "e", "prompt": "the river"})
        assert counted.json() == {
            "count": 4, "max_model_len": MAX_LEN, "tokens": [CLS, THE, RIVER, SEP], "token_strs": None,
        }  # fmt: skip
        refused = await client.post("/detokenize", json={"model": "e", "tokens": [THE]})
        assert refused.status_code == 400 and "is an encoder" in refused.json()["error"]["message"]


async def test_pairs_are_scored() -> None:
    engine = FakeEngine()
    async with client_of(Kind.SCORE, engine, labels=1) as (client, _):
        engine.embedding = logits
        response = await client.post("/v1/score", json={"model": "e", "text_1": "what", "text_2": ["a", "the river"]})
        answer = response.json()
        assert [each["index"] for each in answer["data"]] == [0, 1]
        assert [each["score"] for each in answer["data"]] == pytest.approx([1 / (1 + np.e), 0.5])
        assert answer["usage"] == {"prompt_tokens": 11, "total_tokens": 11} and answer["object"] == "list"
        pairs = await client.post("/v1/score", json={"model": "e", "text_1": ["a", "the"], "text_2": ["what", "river"]})
        assert len(pairs.json()["data"]) == 2
        assert engine.embeddings[-1].inputs[1] == TextInput([CLS, THE, SEP, RIVER, SEP], 3)
        for first, second in ((["a", "b"], ["a"]), ([], []), (["a"], [])):
            error = await refusal(client, "/v1/score", {"text_1": first, "text_2": second})
            assert error["param"] == "text_1"


async def test_documents_are_put_in_order() -> None:
    engine = FakeEngine()
    documents = ["a", "the river of water", "the river"]
    async with client_of(Kind.SCORE, engine, labels=1) as (client, _):
        engine.embedding = logits
        body = {"model": "e", "query": "what", "documents": documents}
        results = (await client.post("/v1/rerank", json=body)).json()["results"]
        assert [(each["index"], each["document"]["text"]) for each in results] == [
            (1, documents[1]), (2, documents[2]), (0, documents[0]),
        ]  # fmt: skip
        assert results[0]["relevance_score"] > results[1]["relevance_score"] > results[2]["relevance_score"]
        few = (await client.post("/v1/rerank", json={**body, "top_n": 1, "return_documents": False})).json()["results"]
        assert few == [{"index": 1, "relevance_score": results[0]["relevance_score"]}]
        for wrong, param in (({"documents": []}, "documents"), ({"top_n": 0}, "top_n"), ({"query": None}, "query")):
            assert (await refusal(client, "/v1/rerank", {**body, **wrong}))["param"] == param


async def test_a_classifier_of_several_labels_scores_nothing() -> None:
    async with client_of(Kind.SCORE, labels=3) as (client, _):
        error = await refusal(client, "/v1/score", {"text_1": "a", "text_2": "b"})
        assert "3 classes" in error["message"]


async def test_a_dead_engine_is_told() -> None:
    engine = FakeEngine()
    async with client_of(engine=engine) as (client, _):
        engine.embedding = lambda request: EngineDeadError("The engine process died.")
        assert (await refusal(client, "/v1/embeddings", {"input": "a"}, 503))["code"] == "engine_dead"
        engine.ready = False
        assert (await refusal(client, "/v1/embeddings", {"input": "a"}, 503))["code"] == "not_ready"


async def test_a_full_server_turns_texts_away() -> None:
    engine, held = FakeEngine(), asyncio.Event()
    async with client_of(engine=engine, max_num_seqs=1, max_waiting=0) as (client, _):
        engine.embedding = lambda request: held
        first = asyncio.create_task(embed(client, "a"))
        await until(lambda: bool(engine.embeddings))
        response = await client.post("/v1/embeddings", json={"model": "e", "input": "a"})
        assert response.status_code == 503 and "retry-after" in response.headers
        held.set()
        await first


async def test_a_caller_that_goes_away_takes_its_texts_along() -> None:
    engine, held = FakeEngine(), asyncio.Event()
    async with client_of(engine=engine) as (client, _):
        engine.embedding = lambda request: held
        task = asyncio.create_task(embed(client, "a"))
        await until(lambda: bool(engine.embeddings))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.wait_for(engine.idle.wait(), 5)
        assert engine.aborted == [engine.embeddings[0].request_id]
