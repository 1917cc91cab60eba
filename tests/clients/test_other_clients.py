"""The examples with other projects' clients against a real server; `make test-clients` installs what they need."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.live import KEY, Live
from tests.clients.scripted_server import ScriptedServer, respond, whole_chat
from tests.live import ROOT

pytestmark = pytest.mark.clients

EXAMPLES = ROOT / "clients" / "examples"
OLDEST_NODE = 20
VERDICT = {"claim": "true", "certain": True}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"certain": {"type": "boolean"}},
            "required": ["certain"],
            "additionalProperties": False,
        },
    },
}


def run(*command: str | Path, url: str) -> str:
    """What a command prints, told where the server is. Fails the test where the command fails."""
    named = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**named, "SERAPH_BASE_URL": url, "SERAPH_API_KEY": KEY}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def python(client: str) -> Path:
    """The interpreter of a client's environment."""
    path = ROOT / ".venv-clients" / client / "bin" / "python"
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: `make test-clients` makes it"
    return path


def said(printed: str) -> Mapping[str, str]:
    """The lines `name: value` of an example."""
    return dict(re.findall(r"^([a-z ]+): (.*)$", printed, re.MULTILINE))


@pytest.fixture
def structured(live: Live) -> Live:
    """The server, where it keeps answers to a JSON schema; it is asked, and the test skipped where it refuses."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "response_format": SCHEMA}
    asked = httpx.post(
        f"{live.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60
    )
    if asked.status_code == 400 and asked.json()["error"]["code"] == "unsupported_parameter":
        pytest.skip(f"the server says: {asked.json()['error']['message']}")
    assert asked.status_code == 200, asked.text
    return live


@pytest.fixture
def node() -> Path:
    """The node to run examples with; the test is skipped, with the reason, where there is none."""
    found = shutil.which("node")
    if found is None:
        pytest.skip(f"Node is missing: its examples need node and npm, version {OLDEST_NODE} or newer")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"Node is too old: {version}, the examples need {OLDEST_NODE} or newer")
    if not (EXAMPLES / "node" / "node_modules" / "openai").exists():
        assert shutil.which("npm") is None, "node_modules is missing: `make test-clients` makes it"
        pytest.skip("npm is missing: it installs what the examples for Node need")
    return Path(found)


def verdict_server(server: ScriptedServer) -> ScriptedServer:
    """A server that lists a model and answers with a verdict, whatever it is asked."""
    server.script(respond({"object": "list", "data": [{"id": "m", "object": "model"}]}))
    server.script(respond(whole_chat(json.dumps(VERDICT))))
    return server


def test_langchain(live: Live) -> None:
    lines = said(run(python("langchain"), EXAMPLES / "langchain_python.py", url=live.url))
    assert lines["whole"] == lines["streamed"] != "''"
    assert lines["tokens"] == "20"
    assert lines["found"] == "Bread is baked from flour."


def test_litellm(live: Live) -> None:
    lines = said(run(python("litellm"), EXAMPLES / "litellm_python.py", url=live.url))
    assert lines["whole"] == lines["streamed"] != "''"
    assert lines["vectors"] == "[96, 96]"


def test_node(live: Live, node: Path) -> None:
    lines = said(run(node, EXAMPLES / "node" / "openai_node.mjs", url=live.url))
    assert lines["whole"] == lines["streamed"] == lines["by events"] == lines["final"] != '""'
    assert lines["request id"] != "undefined"
    assert lines["stopped after"] == "chat.completion.chunk"
    assert lines["refused"] == "400 temperature"
    assert lines["vectors"] == "[96,96]"
    live.wait_until_idle()


def test_instructor(structured: Live) -> None:
    assert_verdict(run(python("instructor"), EXAMPLES / "instructor_python.py", url=structured.url))


def test_node_parse(structured: Live, node: Path) -> None:
    assert_verdict(run(node, EXAMPLES / "node" / "openai_node_parse.mjs", url=structured.url))


def test_what_instructor_asks_for(server: ScriptedServer) -> None:
    printed = run(python("instructor"), EXAMPLES / "instructor_python.py", url=verdict_server(server).url)
    assert json.loads(printed) == VERDICT
    asks_for_a_verdict(server.seen[-1].body)


def test_what_node_s_parse_asks_for(server: ScriptedServer, node: Path) -> None:
    printed = run(node, EXAMPLES / "node" / "openai_node_parse.mjs", url=verdict_server(server).url)
    assert json.loads(printed) == VERDICT
    asks_for_a_verdict(server.seen[-1].body)


def asks_for_a_verdict(body: Any) -> None:
    """Whether a request is one for an answer by the examples' schema."""
    asked = body["response_format"]
    assert asked["type"] == "json_schema"
    assert set(asked["json_schema"]["schema"]["required"]) == set(VERDICT)


def assert_verdict(printed: str) -> None:
    verdict = json.loads(printed)
    assert verdict["claim"] in ("true", "false", "unknown")
    assert isinstance(verdict["certain"], bool)
