"""The server over a real vLLM: what happens when its processes die, and that nothing of them stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engine.config import DEFAULT_MODEL, has_gpu
from engine.llm import LLM
from tests.live import VLLM_FLAGS, VLLM_START, LiveServer, StartError, live_server
from tests.tiny_encoders import ENCODERS, seed_of

pytestmark = pytest.mark.vllm

CHAT = "/v1/chat/completions"
NUM_STREAMS = 16
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server("--max-model-len", "2048") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=VLLM_START) as client:
        yield client


def body(question: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        **fields,
    }


class Stream(threading.Thread):
    """A streamed answer as it comes."""

    def __init__(self, url: str, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, {**fields, "stream": True, "stream_options": {"include_usage": True}}
        self.pieces: list[str] = []
        self.error: dict[str, Any] | None = None
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.done = False
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._url + CHAT, json=self._body, timeout=VLLM_START) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        self.error = event.get("error", self.error)
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.pieces.append(choice["delta"].get("content") or "")
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def wait_until(condition: Any, seconds: float = VLLM_START) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def processes(parent: int) -> dict[int, str]:
    """The processes that descend from one, and their names."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in told.splitlines()]
    found, wanted = {}, {str(parent)}
    for _ in range(5):
        for pid, above, name in rows:
            if above in wanted:
                found[int(pid)] = name
        wanted |= {str(pid) for pid in found}
    return found


def engine_core(server: LiveServer) -> int:
    (pid,) = [pid for pid, name in processes(server.process.pid).items() if "EngineCore" in name]
    return pid


def alive(pids: Any) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and _state(pid) != "Z"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def engine_metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"seraph_engine_{name}{{")]
    return float(lines[0].split()[-1])


def check_cpus(server: LiveServer) -> None:
    """The server keeps off the CPUs that vLLM has bound its threads to, if it has."""
    usable = os.sched_getaffinity(0)
    for pid, name in processes(server.process.pid).items():
        cpus = os.sched_getaffinity(pid)
        if "Worker" in name and not cpus >= usable:
            assert not cpus & os.sched_getaffinity(server.process.pid)


def test_answers(server: LiveServer, client: httpx.Client) -> None:
    check_cpus(server)
    question = "Tell me the capital of France."
    answer = client.post(CHAT, json=body(question, logprobs=True, top_logprobs=2)).json()
    assert "Paris" in answer["choices"][0]["message"]["content"]
    content = answer["choices"][0]["logprobs"]["content"]
    assert all(len(each["top_logprobs"]) == 2 and each["logprob"] <= 0 for each in content)
    again = client.post(CHAT, json=body(question)).json()
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]
    scored = client.post(
        "/v1/completions",
        json={"model": DEFAULT_MODEL, "prompt": "The capital of France", "max_tokens": 0, "echo": True, "logprobs": 1},
    ).json()["choices"][0]
    assert scored["text"] == "The capital of France" and scored["logprobs"]["token_logprobs"][0] is None
    assert all(value < 0 for value in scored["logprobs"]["token_logprobs"][1:])


def test_the_engine_s_death_under_sixteen_streams(server: LiveServer, client: httpx.Client) -> None:
    questions = [f"Tell me a long story about the number {i}." for i in range(NUM_STREAMS)]
    streams = [Stream(server.base_url, **body(question, ignore_eos=True)) for question in questions]
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": {"type": "array", "minItems": 500}}}
    formal = Stream(server.base_url, **body("Count.", response_format=form, max_tokens=1500))
    sampled = Stream(server.base_url, **body("Tell me a joke.", temperature=1, seed=3, ignore_eos=True, n=1))
    everybody = [*streams, formal, sampled]
    wait_until(lambda: all(len(stream.text) > 40 for stream in everybody))
    before = [stream.text for stream in everybody]
    restarts = engine_metric(client, "restarts_total")
    os.kill(engine_core(server), signal.SIGKILL)
    for stream in everybody:
        stream.join(VLLM_START)
    for stream, text in zip(everybody, before, strict=True):
        assert stream.text.startswith(text)
    for stream in (*streams, sampled):
        assert stream.done and stream.error is None
        assert (stream.finish_reason, stream.usage["completion_tokens"]) == ("length", NUM_TOKENS)
    assert formal.error is not None and formal.error["code"] == "engine_dead", "what had a form has begun it"
    assert engine_metric(client, "restarts_total") == restarts + 1
    check_cpus(server)
    assert len(client.post(CHAT, json=body("Hi", max_tokens=4)).json()["choices"]) == 1


def test_who_leaves_leaves_nothing_behind(server: LiveServer, client: httpx.Client) -> None:
    def leave(i: int) -> None:
        fields = body(f"Tell me about {i}.", max_tokens=1500, ignore_eos=True, n=1 + i % 2, stream=True)
        with httpx.stream("POST", server.base_url + CHAT, json=fields, timeout=VLLM_START) as response:
            lines = response.iter_lines()
            for _ in range(i % 7):
                next(lines)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(40)))
    client.post(CHAT, json=body("Hi", max_tokens=1))  # vLLM counts with each step
    wait_until(lambda: engine_metric(client, "num_running") == engine_metric(client, "num_waiting") == 0)
    client.post(CHAT, json=body("Hi", max_tokens=1))
    assert engine_metric(client, "num_free_blocks") == engine_metric(client, "num_blocks") > 0
    assert 'seraph_sequences{model="' + DEFAULT_MODEL + '"} 0.0' in client.get("/metrics").text


def test_encoders(tmp_path: Path) -> None:
    texts = ["the river", "what is a mountain?", "water " * 40, "bread"]
    for name in ("minilm", "cross"):
        ENCODERS[name].write(tmp_path / name, seed_of(name))
    home = {"SERAPH_HOME": str(tmp_path / "home")}
    with (
        live_server(tmp_path / "minilm", tmp_path / "cross", "--vllm-arg", "dtype=float32", environment=home) as server,
        httpx.Client(base_url=server.base_url, timeout=60) as client,
    ):
        kinds = {each["id"]: each["kind"] for each in client.get("/v1/models").json()["data"]}
        assert kinds == {"minilm": "embed", "cross": "score"}
        told = client.post("/v1/embeddings", json={"model": "minilm", "input": texts}).json()["data"]
        got = np.array([each["embedding"] for each in told])
        asked = {"model": "cross", "query": "what is water", "documents": texts}
        ranked = client.post("/v1/rerank", json=asked).json()["results"]
        assert client.post("/v1/embeddings", json={"model": "minilm", "input": "x " * 300}).status_code == 400
        assert client.post("/v1/completions", json={"model": "minilm", "prompt": "x"}).status_code == 400
    with LLM(str(tmp_path / "minilm"), home=tmp_path / "home", progress=False, quantization="none") as llm:
        ours = llm.embed(texts, progress=False)
    assert (np.sum(got * ours, axis=1) > 0.999).all()
    with LLM(str(tmp_path / "cross"), home=tmp_path / "home", progress=False, quantization="none") as llm:
        scores = llm.score("what is water", texts, progress=False)
    found = [each["relevance_score"] for each in sorted(ranked, key=lambda each: int(each["index"]))]
    np.testing.assert_allclose(found, scores, atol=0.01)


@pytest.mark.parametrize(
    "fields",
    [
        {"allowed_token_ids": [1 << 20]},
        {"logit_bias": {str(1 << 20): 1}},
        {"temperature": 3},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "sting"}}}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_refused(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = client.post(CHAT, json=body("Hi", **fields))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_server_that_is_killed_takes_its_processes_along() -> None:
    with live_server("--max-model-len", "512") as server:
        pids = set(processes(server.process.pid))
        assert len(alive(pids)) >= 2
        server.stop(signal.SIGKILL)
        wait_until(lambda: not alive(pids), 20)


def test_a_start_that_is_interrupted_leaves_nothing() -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *VLLM_FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "the engine process is there" in line:
                break
        pids = set(processes(process.pid))
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(120) in (0, 130)
        wait_until(lambda: not alive(pids), 30)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--vllm-arg", "nonsense=1"), "unrecognized arguments: --nonsense=1"),
        (("--max-model-len", "1000000"), "max_model_len"),
        (("--kv-cache-memory", "100000GiB"), "out of memory" if has_gpu() else "less than requested memory"),
        pytest.param(
            ("--vllm-arg", "enable-sleep-mode=true"),
            "not supported on current platform",
            marks=pytest.mark.skipif(has_gpu(), reason="GPUs have it"),
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_start_that_cannot_be_says_why(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(StartError) as caught, live_server(*flags):
        pass
    told = str(caught.value)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], told
    assert "Traceback" not in told
