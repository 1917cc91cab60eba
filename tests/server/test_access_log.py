"""The access log: one line a request, with its id, its tokens and how long it took."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import EngineError
from tests.conftest import ConfigureLogs
from tests.server.fakes import FakeEngine, say
from tests.server.support import Client, chat, client_for

ID = {"x-request-id": "mine"}


async def test_a_generation_says_its_tokens(client: Client, engine: FakeEngine, configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")
    answer = await client.post("/v1/chat/completions", json=chat("Hi"), headers=ID)
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert line.pop("seconds") >= line.pop("time_to_first_token") > 0
    text, _ = line.pop("message"), line.pop("time")
    assert (
        text.startswith("POST /v1/chat/completions 200 0.0") and "3 tokens in (0 cached), 13 out, first after" in text
    )
    assert line == {
        "level": "info",
        "logger": "seraph.access",
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "answer_id": answer.json()["id"],
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 13,
    }
    assert engine.requests[0].trace == "mine"  # the engine process names it too


async def test_streams_are_told_when_they_end(client: Client, configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")
    await client.post("/v1/chat/completions", json=chat(stream=True, max_tokens=2))
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert (line["status"], line["completion_tokens"]) == (200, 2)


async def test_a_refused_request_has_no_tokens(client: Client, configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "text")
    await client.post("/v1/chat/completions", json=chat(temperature=9), headers=ID)
    assert "INFO seraph.access [mine]: POST /v1/chat/completions 400 0.0" in stream.getvalue()
    assert "tokens in" not in stream.getvalue()


async def test_every_line_of_a_failure_carries_its_request(configure_logs: ConfigureLogs) -> None:
    async with client_for(FakeEngine(lambda request: [EngineError("a secret")])) as client:
        stream = configure_logs("info", "json")
        await client.post("/v1/chat/completions", json=chat(), headers=ID)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["logger"], line["request_id"]) for line in lines] == [
        ("seraph.server", "mine"),
        ("seraph.access", "mine"),
    ]
    assert "a secret" in lines[0]["exception"] and lines[1]["status"] == 500


async def test_a_failure_in_mid_stream_says_how_far_it_came(configure_logs: ConfigureLogs) -> None:
    def script(request: Any) -> list[Any]:
        return [*say(request, "ab", finish=None), EngineError("late")]

    async with client_for(FakeEngine(script)) as client:
        stream = configure_logs("info", "json")
        await client.post("/v1/chat/completions", json=chat(stream=True), headers=ID)
    *_, access = map(json.loads, stream.getvalue().splitlines())
    assert (access["status"], access["completion_tokens"], access["request_id"]) == (200, 2, "mine")


async def test_a_path_cannot_forge_a_line(client: Client, configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "text")
    await client.get("/a%0a2026-01-01 INFO seraph.access: GET /forged 200")
    assert len(stream.getvalue().splitlines()) == 1 and "/a\\n2026" in stream.getvalue()


@pytest.mark.parametrize(("level", "lines"), [("info", 0), ("debug", 1)])
async def test_health_checks_are_told_for_debugging_only(
    client: Client, configure_logs: ConfigureLogs, level: str, lines: int
) -> None:
    stream = configure_logs(level, "text")
    await client.get("/health")
    assert sum("/health" in line for line in stream.getvalue().splitlines() if "seraph.access" in line) == lines


async def test_nothing_is_made_of_lines_that_nobody_wants(client: Client, configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("warning", "text")
    await client.post("/v1/chat/completions", json=chat(), headers=ID)
    assert stream.getvalue() == ""
