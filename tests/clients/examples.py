"""The examples, run against a server, and what they print."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import jsonschema

from tests.clients.live import KEY
from tests.live import ROOT

EXAMPLES = ROOT / "clients" / "examples"
WEATHER = {"Paris": "18 degrees, cloudy", "Oslo": "3 degrees, snow", "Lima": "25 degrees, sunny"}
"""What the tool of the examples returns."""

ARGUMENTS = {
    "type": "object",
    "properties": {"city": {"enum": list(WEATHER)}},
    "required": ["city"],
    "additionalProperties": False,
}


def run(*command: str | Path, url: str, given: str = "") -> str:
    """What a command prints, told where the server is. Fails the test where the command fails."""
    named = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ours = {"SERAPH_BASE_URL": url, "SERAPH_API_KEY": KEY, "PYTHONPATH": str(ROOT / "clients" / "python" / "src")}
    done = subprocess.run(
        [*map(str, command)], env={**named, **ours}, input=given, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def said(printed: str) -> Mapping[str, str]:
    """The lines `name: value` of an example."""
    return dict(re.findall(r"^([a-z ]+): (.*)$", printed, re.MULTILINE))


def assert_verdict(printed: str) -> None:
    verdict = json.loads(printed)
    assert verdict["claim"] in ("true", "false", "unknown")
    assert isinstance(verdict["certain"], bool)


def assert_tools(printed: str) -> None:
    """Whether an example has had its tool called, whole and streamed alike, and got an answer after that."""
    calls = [json.loads(found) for found in re.findall(r"^called: weather (.*)$", printed, re.MULTILINE)]
    for arguments in calls:
        jsonschema.validate(arguments, ARGUMENTS)
    half = len(calls) // 2
    assert half and calls[:half] == calls[half:], printed
    assert re.findall(r"^returned: (.*)$", printed, re.MULTILINE) == [WEATHER[each["city"]] for each in calls]
    lines = said(printed)
    assert lines["whole"] == lines["streamed"] and len(lines["whole"]) > len("''")
    if "by pieces" in lines:
        assert json.loads(json.loads(lines["by pieces"])) == calls[-1]
