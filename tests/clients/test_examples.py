"""The examples and both clients against a real server with a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seraph_client import AsyncClient, AuthenticationError, Client
from tests.live import ROOT, live_server
from tests.tiny_gguf import TinyLlama

EXAMPLES = ROOT / "clients" / "examples"
KEY = "example-key"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    model = folder / "tiny.gguf"
    TinyLlama().write(model)
    with live_server(model, "--api-key", KEY, environment={"SERAPH_HOME": str(folder / "home")}) as server:
        yield server.base_url


def run(*command: str, url: str, given: str = "") -> str:
    """What a command prints, told where the server is. Fails the test where the command fails."""
    environment = {
        **os.environ,
        "SERAPH_BASE_URL": url,
        "SERAPH_API_KEY": KEY,
        "PYTHONPATH": str(ROOT / "clients" / "python" / "src"),
    }
    done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(url: str) -> None:
    models, answer, *events = run("sh", str(EXAMPLES / "curl.sh"), url=url).splitlines()
    assert json.loads(models)["data"][0]["id"] == "tiny"
    whole = json.loads(answer)["choices"][0]["message"]["content"]
    data = [line.removeprefix("data: ") for line in events if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in data) == whole


def test_openai_python(url: str) -> None:
    printed = run(sys.executable, str(EXAMPLES / "openai_python.py"), url=url)
    whole, streamed = printed[: len(printed) // 2], printed[len(printed) // 2 :]
    assert whole.strip()
    assert whole == streamed


def test_seraph_client_chat(url: str) -> None:
    printed = run(sys.executable, str(EXAMPLES / "seraph_client_chat.py"), url=url, given="Hi\nAnd again\n\n")
    assert len(printed) > 10


def test_the_client_s_whole_and_streamed_answers_agree(url: str) -> None:
    with Client(url, api_key=KEY) as client:
        (model,) = client.models()
        assert client.is_ready()
        assert (model.id, model.max_model_len) == ("tiny", 512)
        whole = client.chat("Hi", temperature=0, max_tokens=24)
        stream = client.stream_chat("Hi", temperature=0, max_tokens=24)
        assert stream.text() == whole.text
        assert stream.usage is not None
        assert stream.usage.completion_tokens == whole.usage.completion_tokens == 24
        assert client.complete([5, 6, 7], max_tokens=3).usage.prompt_tokens == 3


async def test_the_async_client(url: str) -> None:
    async with AsyncClient(url, api_key=KEY) as client:
        whole = await client.chat("Hi", temperature=0, max_tokens=24)
        async with await client.stream_chat("Hi", temperature=0, max_tokens=24) as stream:
            assert await stream.text() == whole.text


def test_a_wrong_key(url: str) -> None:
    with Client(url, api_key="wrong") as client, pytest.raises(AuthenticationError):
        client.chat("Hi", model="tiny")


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text()
    assert all(f'"{path.name}"' in source for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))
