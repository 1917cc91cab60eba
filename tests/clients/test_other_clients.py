"""The examples with other projects' clients against a real server; `make test-clients` installs what they need."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.examples import EXAMPLES, assert_tools, assert_verdict, run, said
from tests.clients.live import Live
from tests.live import ROOT

pytestmark = pytest.mark.clients

OLDEST_NODE = 20


def python(client: str) -> Path:
    """The interpreter of a client's environment."""
    path = ROOT / ".venv-clients" / client / "bin" / "python"
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: `make test-clients` makes it"
    return path


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


def test_langchain(live: Live) -> None:
    lines = said(run(python("langchain"), EXAMPLES / "langchain_python.py", url=live.url))
    assert lines["whole"] == lines["streamed"] != "''"
    assert lines["tokens"] == "20"
    assert lines["found"] == "Bread is baked from flour."


def test_litellm(live: Live) -> None:
    lines = said(run(python("litellm"), EXAMPLES / "litellm_python.py", url=live.url))
    assert lines["whole"] == lines["streamed"] != "''"
    assert lines["vectors"] == "[96, 96]"


def test_langchain_tools(live: Live) -> None:
    assert_tools(run(python("langchain"), EXAMPLES / "langchain_tools.py", url=live.url))


def test_litellm_tools(live: Live) -> None:
    assert_tools(run(python("litellm"), EXAMPLES / "litellm_tools.py", url=live.url))


def test_node_tools(live: Live, node: Path) -> None:
    assert_tools(run(node, EXAMPLES / "node" / "openai_node_tools.mjs", url=live.url))


def test_node(live: Live, node: Path) -> None:
    lines = said(run(node, EXAMPLES / "node" / "openai_node.mjs", url=live.url))
    assert lines["whole"] == lines["streamed"] == lines["by events"] == lines["final"] != '""'
    assert lines["request id"] != "undefined"
    assert lines["stopped after"] == "chat.completion.chunk"
    assert lines["refused"] == "400 temperature"
    assert lines["vectors"] == "[96,96]"
    live.wait_until_idle()


def test_instructor(live: Live) -> None:
    by_schema, by_tool = run(python("instructor"), EXAMPLES / "instructor_python.py", url=live.url).splitlines()
    assert_verdict(by_schema)
    assert_verdict(by_tool)


def test_node_parse(live: Live, node: Path) -> None:
    assert_verdict(run(node, EXAMPLES / "node" / "openai_node_parse.mjs", url=live.url))
