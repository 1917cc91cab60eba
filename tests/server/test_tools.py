"""Calls of tools over both ways of answering, from a scripted engine: what is asked of it, and what is read out."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from engine.request import FinishReason, Request, TokenDelta
from engine.text.tool_formats import FORMATS, GENERIC, LLAMA3_JSON, MISTRAL, QWEN3_CODER, ToolFormat
from server.app import create_app
from server.registry import ServedModel
from server.settings import FORMATS_OF_TOOLS
from tests.engine.sampling.test_tool_grammar import allows
from tests.engine.text.test_answer_parser import write
from tests.server.fakes import FakeEngine, FakeText, say
from tests.server.support import Client, chat, chunks_of, settings, wait_until

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": SCHEMA, "strict": True}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
PARIS, OSLO = '{"city": "Paris"}', '{"city":"Oslo } <tool_call>"}'


@asynccontextmanager
async def speaking(said: str, text: FakeText | None = None) -> AsyncIterator[tuple[Client, FakeEngine]]:
    """A client of a server whose model says that."""
    engine = FakeEngine(lambda request: say(request, said), max_model_len=1024)
    model = ServedModel(names=("m",), source="m", engine=engine, text=text or FakeText())
    app = create_app(settings(), [model])
    async with app.router.lifespan_context(app):
        await wait_until(lambda: app.state.service.started)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            yield client, engine


def assembled(chunks: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str]:
    """The message that a stream's chunks add up to, and its finish reason."""
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    reason = ""
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        reason = choice["finish_reason"] or reason
        for name, value in choice["delta"].items():
            if name == "tool_calls":
                (part,) = value
                if part["index"] == len(calls):
                    assert part["type"] == "function" and part["id"] and part["function"]["name"]
                    calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
                else:
                    assert part["index"] == len(calls) - 1 and set(part) == {"index", "function"}
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
            elif isinstance(value, str) and name != "role":
                message[name] = message.get(name, "") + value
            else:
                message[name] = value
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return message, reason


def without_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = [{**call, "id": ""} for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls}


async def both(client: Client, **fields: Any) -> tuple[dict[str, Any], str]:
    """An answer's message and finish reason, which streamed and whole are the same."""
    body = chat(**{"tools": [TOOL, CLOCK], **fields})
    whole = await client.post("/v1/chat/completions", json=body)
    assert whole.status_code == 200, whole.text
    (choice,) = whole.json()["choices"]
    streamed = await client.post("/v1/chat/completions", json={**body, "stream": True})
    message, reason = assembled(chunks_of(streamed.text))
    assert (without_ids(message), reason) == (without_ids(choice["message"]), choice["finish_reason"])
    return choice["message"], reason


def called(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]


def as_read(form: ToolFormat, arguments: str) -> str:
    """Arguments as they come back: as they were written, but where that was no JSON."""
    return arguments if form.parameter is None else json.dumps(json.loads(arguments))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
async def test_calls_whole_and_streamed(form: ToolFormat) -> None:
    several = form.separator is not None
    calls = [("weather", PARIS), ("weather", OSLO), ("clock", "{}")][: 3 if several else 1]
    lead = "" if form.only_first else "Let me look. "
    async with speaking(lead + write(form, *calls), FakeText(form)) as (client, engine):
        message, reason = await both(client)
        assert (message["content"], reason) == (lead.strip() or None, "tool_calls")
        assert called(message) == [(name, as_read(form, arguments)) for name, arguments in calls]
        assert "reasoning" not in message
        grammar = engine.requests[-1].grammar
        assert grammar is not None and allows(grammar, lead + write(form, *calls))
        parts = [each.get("name") for each in json.loads(grammar)["grammars"]]
        assert parts == ([None, "t0", "t1"] if form.parameter is None else [None]), "a text needs no grammar of JSON"
        ids = [call["id"] for call in message["tool_calls"]]
        assert len(set(ids)) == len(ids)
        assert all(len(id) == form.id_length if form.id_length is not None else id.startswith("call_") for id in ids)


async def test_an_answer_without_calls() -> None:
    async with speaking("Hello <tool_cal") as (client, engine):
        message, reason = await both(client)
        assert (message, reason) == ({"role": "assistant", "content": "Hello <tool_cal", "refusal": None}, "stop")
        assert engine.requests[-1].grammar is not None
        await both(client, tools=[])
        assert engine.requests[-1].grammar is None


async def test_the_choice_decides_the_grammar() -> None:
    async with speaking("x") as (client, engine):

        async def grammar(**fields: Any) -> list[dict[str, Any]]:
            response = await client.post("/v1/chat/completions", json=chat(tools=[TOOL, CLOCK], **fields))
            assert response.status_code == 200, response.text
            made = engine.requests[-1].grammar
            assert made is not None
            grammars: list[dict[str, Any]] = json.loads(made)["grammars"]
            return grammars

        assert "TEXT" in (await grammar())[0]["lark_grammar"]
        assert await grammar(tool_choice="auto") == await grammar()
        assert "TEXT" not in (await grammar(tool_choice="required"))[0]["lark_grammar"]
        named = await grammar(tool_choice={"type": "function", "function": {"name": "clock"}})
        assert "weather" not in json.dumps(named) and "TEXT" not in named[0]["lark_grammar"]
        assert len(await grammar(tool_choice="none")) == 1
        allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "weather"}}]}
        some = await grammar(tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        assert "clock" not in json.dumps(some) and "TEXT" in some[0]["lark_grammar"]
        assert "{0,127}" in (await grammar())[0]["lark_grammar"]
        assert "{0,127}" not in (await grammar(parallel_tool_calls=False))[0]["lark_grammar"]
        form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
        assert "json_schema" in (await grammar(tool_choice="none", response_format=form))[0]


FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


async def test_a_form_of_answers_that_do_not_call() -> None:
    for form in FORMATS.values():
        if form.only_first:
            continue
        for said, calls in ((OSLO, []), (write(form, ("weather", OSLO)), [("weather", as_read(form, OSLO))])):
            async with speaking(said, FakeText(form)) as (client, engine):
                message, reason = await both(client, response_format=FORM)
                assert called({"tool_calls": [], **message}) == calls
                assert (message["content"], reason) == ((None, "tool_calls") if calls else (OSLO, "stop"))
                grammar = engine.requests[-1].grammar
                assert grammar is not None and allows(grammar, said) and not allows(grammar, "{}")
    async with speaking("x", FakeText(LLAMA3_JSON)) as (client, _):
        response = await client.post("/v1/chat/completions", json=chat(tools=[TOOL], response_format=FORM))
        assert response.status_code == 400 and response.json()["error"]["param"].startswith("response_format")


@pytest.mark.parametrize("form", [GENERIC, QWEN3_CODER], ids=lambda form: form.name)
async def test_cut_off_within_a_call(form: ToolFormat) -> None:
    written = write(form, ("weather", PARIS))
    async with speaking(written, FakeText(form)) as (client, _):
        for size in (3, 20, written.index("Paris") + 2, len(written) - 3):
            message, reason = await both(client, max_tokens=size)
            assert reason == "length"
            assert all(PARIS.startswith(arguments) for _, arguments in called({"tool_calls": [], **message}))
        assert called(message) == [("weather", PARIS)]


async def test_reasoning() -> None:
    reasoner = FakeText(reasons=True)
    async with speaking("<think>\nHm.\n</think>\n\n" + write(GENERIC, ("clock", "{}")), reasoner) as (client, engine):
        message, reason = await both(client)
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("Hm.", "Hm.", None)
        assert (called(message), reason) == ([("clock", "{}")], "tool_calls")
        assert "think?" in json.loads(engine.requests[-1].grammar or "")["grammars"][0]["lark_grammar"]
        response = await client.post("/v1/chat/completions", json=chat("<think>", tools=[TOOL], max_tokens=7))
        assert response.json()["choices"][0]["message"]["reasoning"] == "<think>", "the prompt has begun it"
    async with speaking("<think>\nHm.\n</think>\n\nHi", reasoner) as (client, engine):
        message, reason = await both(client, tools=None)
        assert (message["reasoning"], message["content"], reason) == ("Hm.", "Hi", "stop")
        assert engine.requests[-1].grammar is None
    async with speaking("<think>\nHm.\n</think>\n\nHi") as (client, _):
        message, _ = await both(client, tools=None)
        assert message == {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi", "refusal": None}


async def test_several_answers_and_details_of_tokens() -> None:
    async with speaking(write(GENERIC, ("clock", "{}"))) as (client, _):
        body = chat(tools=[CLOCK], n=2, return_token_ids=True)
        whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"]
        assert [called(choice["message"]) for choice in whole] == [[("clock", "{}")]] * 2
        streamed = chunks_of((await client.post("/v1/chat/completions", json={**body, "stream": True})).text)
        for index in (0, 1):
            message, reason = assembled(streamed, index)
            assert (called(message), reason) == ([("clock", "{}")], "tool_calls")
            parts = [choice for chunk in streamed for choice in chunk["choices"] if choice["index"] == index]
            token_ids = [token_id for part in parts for token_id in part.get("token_ids") or []]
            assert token_ids == whole[index]["token_ids"]


def function(**changes: Any) -> dict[str, Any]:
    return {"tools": [TOOL, {"type": "function", "function": {"name": "f", **changes}}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    (function(name="a b"), "tools.1.function.name", "pattern"),
    (function(name="a" * 65), "tools.1.function.name", "pattern"),
    (function(name="weather"), "tools.1.function.name", "two tools named 'weather'"),
    (function(parameters=[]), "tools.1.function.parameters", ""),
    (function(parameters={"type": "array"}), "tools.1.function.parameters", "of f must have type 'object'"),
    (function(parameters={"type": "object", "not": {}}), "tools.1.function.parameters", "of f: .* not supported: not"),
    (function(parameters={"properties": {"x": {"type": "y"}}}), "tools.1.function.parameters", "of f: "),
    ({"tools": [CLOCK] * 129}, "tools", "at most 128"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type", ""),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ({"tools": {}}, "tools", "list"),
    (function(parameters={"type": "object", "description": "x" * 140_000}), "tools", "at most 131072 bytes"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "must be none, auto, required"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
    ({"tools": [TOOL], "guided_regex": "a"}, "guided_regex", "must be JSON beside tools"),
    ({"tools": [TOOL], "stop": ["x"]}, "stop", "cut calls of tools"),
    ({"tools": [TOOL], "stop_token_ids": [5]}, "stop_token_ids", "cut calls of tools"),
    ({"tools": [TOOL], "ignore_eos": True}, "ignore_eos", "end could not be told"),
    ({"functions": [{"name": "f"}]}, "functions", "use tools and tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call", "use tools and tool_choice"),
    ({"tools": [TOOL], "parallel_tool_calls": "no"}, "parallel_tool_calls", ""),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=lambda value: str(value)[:50])
async def test_what_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    async with speaking("x") as (client, engine):
        for stream in (False, True):
            response = await client.post("/v1/chat/completions", json=chat(stream=stream, **fields))
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"].startswith(param), error
            assert re.search(message, error["message"]), error
        assert not engine.requests


async def test_a_broken_answer_is_the_server_s_fault() -> None:
    """An engine that does not keep to the grammar: no call is invented."""

    def script(request: Request) -> list[TokenDelta]:
        return say(request, "<tool_call>{}", finish=FinishReason.STOP)

    async with speaking("") as (client, engine):
        engine.script = script
        response = await client.post("/v1/chat/completions", json=chat(tools=[CLOCK]))
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")


def test_the_setting_has_every_format() -> None:
    assert set(FORMATS_OF_TOOLS) == FORMATS.keys()


async def test_models_tell_their_format() -> None:
    async with speaking("x", FakeText(MISTRAL, reasons=True)) as (client, _):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert (model["tool_format"], model["reasoning"]) == ("mistral", True)
