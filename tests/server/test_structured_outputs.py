"""The fields that say what form an answer has: what reaches the engine, and what is refused before it does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.server.fakes import FakeEngine
from tests.server.support import Client, chat, chunks_of, client_for, text_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> FakeEngine:
    return FakeEngine()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(engine: FakeEngine) -> AsyncIterator[Client]:
    async with client_for(engine) as client:
        yield client


pytestmark = pytest.mark.asyncio(loop_scope="module")


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "Hi", **fields}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": FORMAT}, "json_schema"),
        ({"response_format": {**FORMAT, "json_schema": {"schema": SCHEMA, "strict": True}}}, "json_schema"),
        ({"response_format": {"type": "json_object"}}, "json_schema"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}}, "json_schema"),
        ({"structured_outputs": {"json_object": True, "regex": None}}, "json_schema"),
        ({"structured_outputs": {"regex": "[ab]+", "disable_fallback": True}}, "lark_grammar"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "lark_grammar"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "lark_grammar"),
        ({"guided_json": SCHEMA}, "json_schema"),
        ({"guided_json": json.dumps(SCHEMA), "guided_decoding_backend": "auto"}, "json_schema"),
        ({"guided_regex": "[ab]+"}, "lark_grammar"),
        ({"guided_choice": ["a", "b"]}, "lark_grammar"),
        ({"guided_grammar": 'start: "a"'}, "lark_grammar"),
    ],
    ids=str,
)
async def test_a_grammar_reaches_the_engine(
    client: Client, engine: FakeEngine, fields: dict[str, Any], expected: str
) -> None:
    for path, body in (("chat/completions", chat(n=2, **fields)), ("completions", completion(**fields))):
        response = await client.post(f"/v1/{path}", json=body)
        assert response.status_code == 200, response.text
        assert "x-seraph-ignored" not in response.headers
        grammar = engine.requests[-1].grammar
        assert grammar is not None and json.loads(grammar)["grammars"][0].get(expected)
        assert engine.requests[-1].sampling.structured_outputs is None
        streamed = await client.post(f"/v1/{path}", json={**body, "stream": True})
        assert streamed.status_code == 200 and chunks_of(streamed.text)
        assert engine.requests[-1].grammar == grammar


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "guided_json": None, "guided_choice": None},
    ],
    ids=str,
)
async def test_no_form_is_no_grammar(client: Client, engine: FakeEngine, fields: dict[str, Any]) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    assert engine.requests[-1].grammar is None


SCHEMA_PARAM = "response_format.json_schema.schema"


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        (of_schema({"not": {}}), SCHEMA_PARAM, "unsupported_keyword", "keywords that are not supported: not"),
        (of_schema({"type": "nonesuch"}), SCHEMA_PARAM, "invalid_grammar", "nonesuch"),
        (of_schema([]), SCHEMA_PARAM, "invalid_value", "dictionary"),
        (of_schema(None), SCHEMA_PARAM, "missing_required_parameter", "is missing"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None, "is missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_parameter", "got 'xml'"),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter", "is missing"),
        ({"structured_outputs": {}}, "structured_outputs", None, "got none"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", None, "got regex and choice"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "invalid_grammar", "unclosed group"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", None, "not supported"),
        ({"structured_outputs": {"whitespace_pattern": "x", "regex": "a"}}, None, "unsupported_parameter", ""),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json", "invalid_value", "must be a JSON schema"),
        ({"guided_json": [1]}, "guided_json", "invalid_value", "must be a JSON schema"),
        ({"guided_json": "{"}, "guided_json", "invalid_grammar", "truncated"),
        ({"guided_choice": []}, "guided_choice", None, "between 1 and"),
        ({"guided_grammar": "start: <[7]>"}, "guided_grammar", None, "tokens cannot be named"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", None, "Only one of guided_regex and"),
        ({**of_schema(SCHEMA), "guided_regex": "a"}, "guided_regex", None, "Only one of"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", None, "its end could not be told"),
        ({"guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern", "unsupported_parameter", ""),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
async def test_what_is_refused(
    client: Client, engine: FakeEngine, fields: dict[str, Any], param: str | None, code: str | None, message: str
) -> None:
    asked = len(engine.requests)
    for body in (chat(**fields), chat(stream=True, **fields)):
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert message in error["message"]
        assert param is None or error["param"] == param
        assert code is None or error["code"] == code
    assert len(engine.requests) == asked


async def test_a_hostile_grammar_keeps_nobody_waiting(client: Client) -> None:
    """Not even those who have a form of their own, as long as it is a known one."""
    await client.post("/v1/chat/completions", json=chat(guided_regex="known"))
    hostile = {"type": "string", "allOf": [{"pattern": f"b{i}"} for i in range(1500)]}
    refused = asyncio.create_task(client.post("/v1/chat/completions", json=chat(guided_json=hostile)))
    for _ in range(3):
        for fields in ({}, {"guided_regex": "known"}):
            response = await client.post("/v1/chat/completions", json=chat(**fields))
            assert response.status_code == 200
    assert not refused.done()
    response = await refused
    assert response.status_code == 400 and "takes more than 1 s" in response.json()["error"]["message"]


async def test_too_many_unchecked_grammars_are_told_to_come_later(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.routes.service.MAX_UNCHECKED", 2)
    bodies = [chat(guided_regex=f"n{i}") for i in range(4)]
    responses = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
    assert sorted(response.status_code for response in responses) == [200, 200, 503, 503]


async def test_text_is_streamed_as_ever(client: Client) -> None:
    response = await client.post("/v1/chat/completions", json=chat(guided_regex="[ab]+", stream=True))
    assert text_of(chunks_of(response.text)) == {0: "Hello, world"}
