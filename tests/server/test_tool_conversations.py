"""Conversations with tools, held with the default model: whole and streamed alike, and always to the schemas."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from tests import live
from tests.live import live_server
from tests.server.support import chunks_of
from tests.server.test_tools import assembled, called, without_ids

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        live_server("--kv-cache-tokens", "8192", "--max-model-len", "4096") as server,
        httpx.Client(base_url=server.base_url, timeout=120) as client,
    ):
        yield client


def tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


WORD = {"type": "string", "maxLength": 20}
TOOLS = (
    tool("get_weather", "The weather of a place", city=WORD, unit={"enum": ["celsius", "fahrenheit"]}),
    tool("add", "The sum of two numbers", a={"type": "integer"}, b={"type": "integer"}),
    tool(
        "book-table",
        "A table in a restaurant",
        people={"type": "integer", "minimum": 1, "maximum": 12},
        time={"type": "string", "pattern": "^[0-2][0-9]:[0-5][0-9]$"},
        wishes={"type": "array", "items": WORD, "maxItems": 3},
    ),
    tool("search", "A search of documents", query=WORD, filter={"anyOf": [{"type": "null"}, {"enum": ["new", "old"]}]}),
    tool("clock", "The time of day"),
)
QUESTIONS = (
    "What is the weather like in Paris?",
    "How much is 17 and 25?",
    "Book a table for four at eight, by the window please.",
    "Find what we have about rivers.",
    "What time is it?",
    "Hello! Who are you?",
)


def conversation(seed: int) -> dict[str, Any]:
    """A request of a seed's own: which tools there are, what is asked, and how it may be answered."""
    draw = random.Random(seed)
    tools = draw.sample(TOOLS, draw.randint(1, len(TOOLS)))
    named = {"type": "function", "function": {"name": draw.choice(tools)["function"]["name"]}}
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": draw.choice(QUESTIONS)}],
        "tools": tools,
        "tool_choice": draw.choice(["required", named, "auto", "required", "none"]),
        "parallel_tool_calls": draw.random() < 0.5,
        "temperature": draw.choice([0, 0.7, 1.2]),
        "seed": seed,
        "max_tokens": draw.choice([128, 128, 128, 24]),
    }


def check(client: httpx.Client, seed: int) -> int:
    """Hold a conversation both ways, and on with results; returns the number of its complete calls."""
    body = conversation(seed)
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    message, reason = choice["message"], choice["finish_reason"]
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True})
    again, reason_again = assembled(chunks_of(streamed.text))
    if live.ENGINE == "native":  # vLLM's tokens depend on what it finds in its cache
        assert (without_ids(again), reason_again) == (without_ids(message), reason), body
    check_answer(body, again, reason_again)
    num_calls = check_answer(body, message, reason)
    if num_calls:
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "Done."} for call in message["tool_calls"]]
        onward = {**body, "messages": [*body["messages"], message, *results], "tool_choice": "none", "max_tokens": 8}
        following = client.post("/v1/chat/completions", json=onward)
        assert following.status_code == 200, following.text
        assert following.json()["choices"][0]["message"]["content"] is not None
    return num_calls


def check_answer(body: dict[str, Any], message: dict[str, Any], reason: str) -> int:
    """An answer to a conversation keeps to what was asked; returns the number of its calls, if they are complete."""
    calls = called({"tool_calls": [], **message})
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in body["tools"]}
    if body["tool_choice"] == "none":
        assert not calls and "<tool_call>" not in message["content"]
    if isinstance(body["tool_choice"], dict):
        assert {name for name, _ in calls} <= {body["tool_choice"]["function"]["name"]}
    if not body["parallel_tool_calls"]:
        assert len(calls) <= 1
    if reason != "tool_calls":
        assert not calls or reason == "length"
        assert reason == "length" or body["tool_choice"] in ("auto", "none")
        return 0
    for name, arguments in calls:
        jsonschema.Draft202012Validator(schemas[name]).validate(json.loads(arguments))
    return len(calls)


def test_conversations_with_tools(client: httpx.Client) -> None:
    assert sum(check(client, seed) for seed in range(8)) >= 3


@pytest.mark.full
def test_100_conversations_with_tools(client: httpx.Client) -> None:
    assert sum(check(client, seed) for seed in range(100, 200)) >= 35


def test_results_reach_the_prompt(client: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "One and two?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "three"},
    ]
    body = {"messages": messages, "tools": [TOOLS[1]]}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    prompt = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>' in prompt
    assert "<tool_response>\nthree\n</tool_response>" in prompt and "The sum of two numbers" in prompt
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["tool_format"], model["reasoning"]) == ("generic", False)
