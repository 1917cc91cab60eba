"""Encoders in real servers: beside a decoder, in processes of their own, alone, loaded at run time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from openai import OpenAI

from engine import LLM
from tests.live import LiveServer, StartError, live_server
from tests.tiny_encoders import ENCODERS, seed_of
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.native("an encoder in the process of a decoder")

KEY = {"authorization": "Bearer the-key"}
SECONDS = 30.0
TEXTS = ["the river", "what is a mountain?", "water " * 40, "bread"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_tiny_llama(path / "a.gguf", context=16_384, seed=1)
    for name in ("minilm", "bge", "cross"):
        ENCODERS[name].write(path / name, seed_of(name))
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    """A decoder, an encoder beside it, and a cross-encoder in a process of its own."""
    flags = ("--threads", "1", "--kv-cache-tokens", "16384", "--admin-key", "the-key", "--allow-remote-load")
    models = (folder / "a.gguf", folder / "cross", "--embedding-model", folder / "minilm")
    with live_server(*models, *flags, environment={"SERAPH_HOME": str(folder / "home")}) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=SECONDS) as client:
        yield client


def offline(folder: Path, name: str, texts: list[str]) -> NDArray[np.float32]:
    with LLM(str(folder / name), home=folder / "home", progress=False, threads=1) as llm:
        return llm.embed(texts, progress=False)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"


def embedded(client: httpx.Client, model: str, texts: list[str]) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": model, "input": texts})


def vectors_of(response: httpx.Response) -> NDArray[np.float32]:
    assert response.status_code == 200, response.text
    return np.array([each["embedding"] for each in response.json()["data"]], np.float32)


def test_what_the_server_gives_is_what_offline_gives(client: httpx.Client, folder: Path) -> None:
    expected = offline(folder, "minilm", TEXTS)
    assert np.array_equal(vectors_of(embedded(client, "minilm", TEXTS)), expected)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: vectors_of(embedded(client, "minilm", TEXTS[i % 4 :])), range(24)))
    for i, answer in enumerate(answers):
        assert np.array_equal(answer, expected[i % 4 :])


def test_texts_and_answers_go_on_beside_each_other(client: httpx.Client) -> None:
    body = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    alone = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with ThreadPoolExecutor(2) as pool:
        texts = [f"the river {i}" for i in range(2000)]
        library = pool.submit(embedded, client, "minilm", texts)
        for _ in range(3):
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == alone
        assert vectors_of(library.result()).shape == (2000, 96)


def test_the_openai_package(server: LiveServer) -> None:
    sdk = OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
    coded = sdk.embeddings.create(model="minilm", input=TEXTS)  # the package asks for base64 by itself
    floats = sdk.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    for one, other in zip(coded.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding)
    assert coded.usage.prompt_tokens == coded.usage.total_tokens > 0
    strict = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", _strict_response_validation=True)
    few = strict.embeddings.create(model="minilm", input="bread", encoding_format="float", dimensions=8)
    assert len(few.data[0].embedding) == 8 and np.linalg.norm(few.data[0].embedding) == pytest.approx(1, abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        strict.embeddings.create(model="minilm", input=[[15339, 1917]])


def test_each_kind_has_its_routes(client: httpx.Client) -> None:
    kinds = {each["id"]: each["kind"] for each in client.get("/v1/models").json()["data"]}
    assert kinds == {"a": "generate", "cross": "score", "minilm": "embed"}
    ranked = client.post("/v1/rerank", json={"model": "cross", "query": "what is water", "documents": TEXTS}).json()
    scores = [each["relevance_score"] for each in ranked["results"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 4
    states = {each["name"]: each for each in client.get("/admin/models", headers=KEY).json()["data"]}
    assert states["minilm"]["pid"] == states["a"]["pid"] != states["cross"]["pid"]


def test_an_encoder_comes_and_goes(client: httpx.Client, folder: Path) -> None:
    def state() -> str | None:
        response = client.get("/admin/models/bge", headers=KEY)
        return response.json()["state"] if response.status_code == 200 else None

    loading = client.post("/admin/models", headers=KEY, json={"model": str(folder / "bge")})
    assert loading.status_code == 202, loading.text
    wait_for(lambda: state() == "ready")
    assert np.array_equal(vectors_of(embedded(client, "bge", TEXTS)), offline(folder, "bge", TEXTS))
    assert client.delete("/admin/models/bge", headers=KEY).status_code == 202
    wait_for(lambda: state() is None)
    assert embedded(client, "bge", TEXTS).status_code == 404
    assert client.delete("/admin/models/minilm", headers=KEY).status_code == 409  # it lives in another's process


def test_what_is_counted(client: httpx.Client) -> None:
    def counted(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = counted("seraph_engine_encoded_texts_total")
    tokens = counted("seraph_engine_encoded_tokens_total")
    usage = embedded(client, "minilm", TEXTS).json()["usage"]["prompt_tokens"]
    assert counted("seraph_engine_encoded_texts_total") == before + 4
    assert counted("seraph_engine_encoded_tokens_total") == tokens + usage
    assert counted("seraph_engine_encoder_seconds_total") > 0


def test_a_crash_takes_both_models_of_a_process_and_brings_both_back(client: httpx.Client, folder: Path) -> None:
    pid = client.get("/admin/models/minilm", headers=KEY).json()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: embedded(client, "minilm", TEXTS).status_code == 200)
    assert client.get("/admin/models/a", headers=KEY).json()["pid"] != pid
    assert np.array_equal(vectors_of(embedded(client, "minilm", TEXTS)), offline(folder, "minilm", TEXTS))


def test_an_encoder_alone(folder: Path) -> None:
    with (
        live_server(folder / "bge", "--threads", "1", environment={"SERAPH_HOME": str(folder / "home")}) as server,
        httpx.Client(base_url=server.base_url, timeout=SECONDS) as client,
    ):
        assert any("64 dimensions" in line for line in server.output)
        assert np.array_equal(vectors_of(embedded(client, "bge", TEXTS)), offline(folder, "bge", TEXTS))
        refused = client.post("/v1/completions", json={"model": "bge", "prompt": "a"}).json()
        assert "does not support completions: it is an embedding model" in refused["error"]["message"]
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--embedding-model", "a.gguf"), "is a language model, not an encoder"), (("bge", "bge"), "Two models")],
)
def test_what_does_not_go_together(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    paths: list[Any] = [each if each.startswith("--") else folder / each for each in arguments]
    with pytest.raises(StartError, match=said), live_server(*paths, environment={"SERAPH_HOME": str(folder / "home")}):
        pass
