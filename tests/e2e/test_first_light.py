"""The default model over HTTP, from the command that people type to the answer that they read."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from engine.config import DEFAULT_MODEL
from engine.weights import PackedModel
from seraph_client import Client
from tests.live import ROOT, LiveServer, live_server

SYSTEM = "You are a helpful assistant."
QUESTION = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "What is the capital of France?"},
]
START_SECONDS = 30.0
"""A start that takes longer hangs; how fast it is on an idle machine is not for a test on a shared one to say."""


@pytest.fixture(scope="module")
def server(default_model: PackedModel) -> Iterator[LiveServer]:
    with live_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=60.0) as made:
        yield made


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": DEFAULT_MODEL, "messages": QUESTION, **fields}


def texts_of(response: httpx.Response) -> dict[int, str]:
    """Each choice's text of a whole or streamed answer, by index."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        return {choice["index"]: choice["message"]["content"] for choice in response.json()["choices"]}
    texts: dict[int, str] = {}
    for line in response.text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    return texts


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + "{")))


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"


def test_the_start_says_how_to_try_it(server: LiveServer) -> None:
    assert server.ready_seconds < START_SECONDS
    text = "\n".join(server.output)
    assert DEFAULT_MODEL in text and "16384 tokens" in text and "curl " + server.base_url in text


def test_echoed_logprobs_are_the_perplexity_of_a_text(client: httpx.Client) -> None:
    """A window of the text whose perplexity tests/golden has by an independent implementation."""
    with np.load(ROOT / "tests" / "golden" / "default_perplexity.npz") as golden:
        prompt, nll = golden["token_ids"][: int(golden["window"])].tolist(), float(golden["nll"][0])
    body = {"model": DEFAULT_MODEL, "prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    for _ in range(2):  # the second time the prompt is cached
        answer = client.post("/v1/completions", json=body).json()
        first, *others = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert first is None and len(others) == len(prompt) - 1
        assert -sum(others) / len(others) == pytest.approx(nll, abs=1e-2)
        assert answer["usage"]["completion_tokens"] == 0
    text, offsets = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]["text_offset"]
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert all(text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True))


def test_logprobs_of_an_answer(client: httpx.Client) -> None:
    fields = {"temperature": 0, "logprobs": True, "top_logprobs": 3, "max_tokens": 12, "repetition_penalty": 1.0}
    whole = client.post("/v1/chat/completions", json=chat(**fields)).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == whole["message"]["content"]
    assert all(each["top_logprobs"][0]["token"] == each["token"] and each["logprob"] <= 0 for each in content)
    streamed = client.post("/v1/chat/completions", json=chat(**fields, stream=True)).text.splitlines()
    events = [json.loads(line[6:]) for line in streamed if line.startswith("data: {")]
    pieces = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [each for piece in pieces for each in piece["content"]] == content


def test_the_capital_of_france(client: httpx.Client) -> None:
    whole = client.post("/v1/chat/completions", json=chat(temperature=0))
    assert "Paris" in texts_of(whole)[0]
    assert whole.json()["choices"][0]["finish_reason"] == "stop"
    streamed = client.post("/v1/chat/completions", json=chat(temperature=0, stream=True))
    assert texts_of(streamed) == texts_of(whole)


def test_the_openai_package(server: LiveServer) -> None:
    with OpenAI(base_url=server.base_url + "/v1", api_key="none", _strict_response_validation=True) as sdk:
        answer = sdk.chat.completions.create(model=DEFAULT_MODEL, messages=QUESTION, temperature=0)  # type: ignore[arg-type]
        assert "Paris" in (answer.choices[0].message.content or "")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            sdk.completions.create(model=DEFAULT_MODEL, prompt="word " * 9000)


def test_our_own_client(server: LiveServer) -> None:
    with Client(server.base_url) as own:
        answer = own.chat(QUESTION, temperature=0)
        assert "Paris" in answer.text
        assert own.stream_chat(QUESTION, temperature=0).text() == answer.text
        assert len(own.tokenize(QUESTION)) == answer.usage.prompt_tokens


def test_sampling_is_reproducible_streamed_or_whole(client: httpx.Client) -> None:
    body = chat(temperature=1.0, seed=7, n=3, max_tokens=24)
    first = texts_of(client.post("/v1/chat/completions", json=body))
    assert len(set(first.values())) > 1  # siblings differ
    assert texts_of(client.post("/v1/chat/completions", json=body)) == first
    assert texts_of(client.post("/v1/chat/completions", json={**body, "stream": True})) == first
    assert texts_of(client.post("/v1/chat/completions", json={**body, "seed": 8})) != first


def test_a_stop_string_ends_the_answer_before_it(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json=chat(temperature=0, stop=" Paris"))
    text = texts_of(response)[0]
    whole = texts_of(client.post("/v1/chat/completions", json=chat(temperature=0)))[0]
    assert text == whole.split(" Paris")[0] != whole
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_a_repeated_prompt_is_found_in_the_cache(client: httpx.Client) -> None:
    body = {
        "model": DEFAULT_MODEL,
        "prompt": "The quick brown fox jumps over the lazy dog. " * 40,
        "max_tokens": 8,
        "temperature": 0,
    }
    first, second = (client.post("/v1/completions", json=body).json() for _ in range(2))
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0.8 * second["usage"]["prompt_tokens"]
    assert second["choices"] == first["choices"]
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]


def test_special_tokens_in_content_are_text(client: httpx.Client) -> None:
    """A message cannot end its own turn: its tokens are more than those of the same text without the control token."""

    def num_tokens(content: str) -> int:
        body = chat(max_tokens=1, messages=[{"role": "user", "content": content}])
        return int(client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"])

    assert num_tokens("a<|im_end|>b") > num_tokens("ab") + 2


def test_a_disconnect_frees_the_engine(client: httpx.Client) -> None:
    body = chat(stream=True, ignore_eos=True, max_tokens=4000)
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes a response whose iterator is dropped
        assert next(lines).startswith("data: ")
        assert metric(client, "seraph_engine_num_running") >= 1
    wait_for(lambda: metric(client, "seraph_engine_num_running") == 0)
    assert metric(client, "seraph_engine_num_free_blocks") == metric(client, "seraph_engine_num_blocks")


def test_a_stream_is_finished_before_the_server_ends(default_model: PackedModel) -> None:
    body = chat(stream=True, ignore_eos=True, max_tokens=150, temperature=0)
    with live_server() as server, httpx.Client(base_url=server.base_url, timeout=60.0) as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(20) == 0
        assert "Traceback" not in "\n".join(server.output)


def test_what_outlasts_the_drain_ends_with_an_error(default_model: PackedModel) -> None:
    body = chat(stream=True, ignore_eos=True, max_tokens=8000, temperature=0)
    with live_server("--drain-timeout", "0.2") as server, httpx.Client(base_url=server.base_url) as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert server.process.wait(20) == 0
        assert "Traceback" not in "\n".join(server.output)


def test_the_terminal_chat(server: LiveServer, default_model: PackedModel) -> None:
    for arguments in ([], ["--url", server.base_url]):
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", "chat", *arguments, "--temperature", "0", "--system", SYSTEM],
            input=QUESTION[1]["content"] + "\n/exit\n",
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert "Paris" in done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_given_form(client: httpx.Client, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome", "Bern"]}, "certain": {"type": "boolean"}},
        "required": ["city", "certain"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    (text,) = texts_of(client.post("/v1/chat/completions", json=chat(response_format=form, stream=stream))).values()
    answer = json.loads(text)
    assert answer.keys() == {"city", "certain"} and answer["city"] in ("Paris", "Rome", "Bern")
