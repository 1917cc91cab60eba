"""The examples against a real server."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jsonschema
import pytest

from tests.clients.examples import ARGUMENTS, EXAMPLES, assert_tools, assert_verdict, run
from tests.clients.live import Live


@pytest.fixture
def url(live: Live) -> str:
    return live.url


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(url: str) -> None:
    models, answer, *events, called = run("sh", EXAMPLES / "curl.sh", url=url).splitlines()
    assert json.loads(models)["data"][0]["id"] == "tiny"
    (call,) = json.loads(called)["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), ARGUMENTS)
    whole = json.loads(answer)["choices"][0]["message"]["content"]
    data = [line.removeprefix("data: ") for line in events if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in data) == whole


def test_openai_python(url: str) -> None:
    printed = run(sys.executable, EXAMPLES / "openai_python.py", url=url)
    whole, streamed = printed[: len(printed) // 2], printed[len(printed) // 2 :]
    assert whole.strip()
    assert whole == streamed


@pytest.mark.parametrize("name", ["openai_tools.py", "seraph_client_tools.py"])
def test_tools(url: str, name: str) -> None:
    assert_tools(run(sys.executable, EXAMPLES / name, url=url))


def test_openai_parse(url: str) -> None:
    assert_verdict(run(sys.executable, EXAMPLES / "openai_parse.py", url=url))


def test_seraph_client_chat(url: str) -> None:
    printed = run(sys.executable, EXAMPLES / "seraph_client_chat.py", url=url, given="Hi\nAnd again\n\n")
    assert len(printed) > 10


def test_seraph_client_search(url: str) -> None:
    printed = run(sys.executable, EXAMPLES / "seraph_client_search.py", "what", "is", "water?", url=url)
    scores = [float(line.partition("  ")[0]) for line in printed.splitlines()]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_every_example_is_run_by_a_test() -> None:
    source = Path(__file__).read_text() + Path(__file__).with_name("test_other_clients.py").read_text()
    examples = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".sh", ".mjs")]
    written = [path for path in examples if "node_modules" not in path.parts]
    assert written and all(f'"{path.name}"' in source for path in written)
