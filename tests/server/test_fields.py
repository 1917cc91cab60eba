"""The field table: complete against the installed openai package, and what each class means."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam

from server.schemas.chat import ChatCompletionRequest, Message
from server.schemas.common import StreamOptions
from server.schemas.completions import CompletionRequest
from server.schemas.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    FUNCTION_FIELDS,
    JSON_SCHEMA_FIELDS,
    MESSAGE_FIELDS,
    RESPONSE_FORMAT_FIELDS,
    STREAM_OPTION_FIELDS,
    STRUCTURED_OUTPUT_FIELDS,
    TOKENIZE_FIELDS,
    TOOL_FIELDS,
    Table,
    Use,
)
from server.schemas.structured import JsonSchema, ResponseFormat, StructuredOutputsBody
from server.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from server.schemas.tools import FunctionDefinition, Tool
from tests.server.fakes import FakeEngine
from tests.server.support import Client, chat, client_for, settings

MESSAGE_PARAMS = (
    "system",
    "developer",
    "user",
    "assistant",
    "tool",
    "function",
)


def names(*typed_dicts: Any) -> set[str]:
    return {name for typed_dict in typed_dicts for name in get_type_hints(typed_dict)}


@pytest.mark.parametrize(
    ("table", "known"),
    [
        (
            CHAT_FIELDS,
            names(
                chat_params.CompletionCreateParamsBase,
                chat_params.CompletionCreateParamsStreaming,
                chat_params.CompletionCreateParamsNonStreaming,
            ),
        ),
        (
            COMPLETION_FIELDS,
            names(
                completion_params.CompletionCreateParamsBase,
                completion_params.CompletionCreateParamsStreaming,
                completion_params.CompletionCreateParamsNonStreaming,
            ),
        ),
        (STREAM_OPTION_FIELDS, names(ChatCompletionStreamOptionsParam)),
    ],
    ids=["chat", "completions", "stream_options"],
)
def test_every_field_of_the_openai_package_is_classed(table: Table, known: set[str]) -> None:
    assert len(known) > 1  # the walk found something
    assert known - table.keys() == set()


def test_every_message_field_of_the_openai_package_is_classed() -> None:
    import openai.types.chat as types

    known = names(*(getattr(types, f"ChatCompletion{role.title()}MessageParam") for role in MESSAGE_PARAMS))
    assert {"role", "content", "tool_calls"} <= known
    assert known - MESSAGE_FIELDS.keys() == set()
    # Whatever an answer's message holds may be sent back.
    assert types.ChatCompletionMessage.model_fields.keys() - MESSAGE_FIELDS.keys() == set()


@pytest.mark.parametrize(
    ("table", "model"),
    [
        (CHAT_FIELDS, ChatCompletionRequest),
        (COMPLETION_FIELDS, CompletionRequest),
        (STREAM_OPTION_FIELDS, StreamOptions),
        (MESSAGE_FIELDS, Message),
        (RESPONSE_FORMAT_FIELDS, ResponseFormat),
        (JSON_SCHEMA_FIELDS, JsonSchema),
        (STRUCTURED_OUTPUT_FIELDS, StructuredOutputsBody),
        (TOOL_FIELDS, Tool),
        (FUNCTION_FIELDS, FunctionDefinition),
        (TOKENIZE_FIELDS, TokenizeRequest),
        (DETOKENIZE_FIELDS, DetokenizeRequest),
    ],
)
def test_what_works_is_what_the_model_declares(table: Table, model: Any) -> None:
    """A field classed as working and not declared would be dropped in silence; the other way round it would be read."""
    assert {name for name, field in table.items() if field.use is Use.WORKS} == {
        field.alias or name for name, field in model.model_fields.items()
    }


REFUSED = [(name, field) for name, field in CHAT_FIELDS.items() if field.use is Use.REFUSED]


@pytest.mark.parametrize(("name", "field"), REFUSED, ids=[name for name, _ in REFUSED])
async def test_refused_fields(client: Client, engine: FakeEngine, name: str, field: Any) -> None:
    for harmless in (None, *field.no_ops):
        response = await client.post("/v1/chat/completions", json=chat(**{name: harmless}))
        assert response.status_code == 200, response.text
        assert "x-seraph-ignored" not in response.headers
    asked = len(engine.requests)
    response = await client.post("/v1/chat/completions", json=chat(**{name: {"something": ["else"]}}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (name, "unsupported_parameter", "invalid_request_error")
    assert name in error["message"]
    assert len(engine.requests) == asked


@pytest.mark.parametrize(
    "no_op",
    [
        {"logprobs": 0},
        {"top_logprobs": False},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"modalities": ["text", "audio"]},
    ],
)
async def test_near_no_ops_are_refused(client: Client, no_op: dict[str, Any]) -> None:
    response = await client.post("/v1/chat/completions", json=chat(**no_op))
    assert response.status_code == 400, response.text


async def test_hints_have_no_effect_and_are_counted(client: Client) -> None:
    hints = {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "prompt_cache_key": "k"}
    plain = await client.post("/v1/chat/completions", json=chat(seed=1))
    hinted = await client.post("/v1/chat/completions", json=chat(seed=1, **hints))
    assert hinted.json()["choices"] == plain.json()["choices"]
    assert "x-seraph-ignored" not in hinted.headers
    metrics = (await client.get("/metrics")).text
    for name in hints:
        assert f'seraph_ignored_fields_total{{class="hint",field="{name}"}} 1.0' in metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_unknown_names_are_reported(client: Client, stream: bool) -> None:
    body = chat(stream=stream, frobnicate=1, **{"x\r\nset-cookie: a": 2})
    body["messages"][0]["mood"] = "good"
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-seraph-ignored"] == "frobnicate, x??set-cookie??a, messages.0.mood"
    assert "set-cookie" not in response.headers
    metrics = (await client.get("/metrics")).text
    assert 'seraph_ignored_fields_total{class="unknown",field="frobnicate"} 1.0' in metrics
    assert 'seraph_ignored_fields_total{class="unknown",field="messages.mood"} 1.0' in metrics


async def test_strict_fields_refuses_unknown_names(engine: FakeEngine) -> None:
    async with client_for(engine, settings(strict_fields=True)) as client:
        assert (await client.post("/v1/chat/completions", json=chat(user="hint"))).status_code == 200
        response = await client.post("/v1/chat/completions", json=chat(frobnicate=None))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("frobnicate", "unknown_parameter")


async def test_callers_cannot_make_series_without_end(client: Client) -> None:
    for start in range(0, 200, 20):
        await client.post("/v1/chat/completions", json=chat(**{f"field{i}": 1 for i in range(start, start + 20)}))
    lines = [line for line in (await client.get("/metrics")).text.splitlines() if "ignored_fields_total{" in line]
    assert len(lines) <= 65
    assert any('field="other"' in line for line in lines)
