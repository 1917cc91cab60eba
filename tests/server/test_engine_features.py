"""Requests that ask for what an engine, or a model, lacks."""

from __future__ import annotations

from typing import Any

import pytest

from engine.features import BY_NAME, Lacks
from server.settings import Settings
from tests.server.fakes import FakeEngine
from tests.server.support import chat, client_for, settings

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ASKED = [
    ("grammar", "response_format", {"response_format": {"type": "json_object"}}),
    ("grammar", "tools", {"tools": [TOOL]}),
    ("logprobs", "logprobs", {"logprobs": True}),
    ("prompt_logprobs", "prompt_logprobs", {"prompt_logprobs": 0}),
    ("priority", "priority", {"priority": -1}),
    ("cache_salt", "cache_salt", {"cache_salt": "s"}),
]


@pytest.mark.parametrize(("feature", "param", "fields"), ASKED, ids=[param for _, param, _ in ASKED])
async def test_what_is_lacking_is_refused_and_nothing_is_computed(
    feature: str, param: str, fields: dict[str, Any]
) -> None:
    engine = FakeEngine()
    async with client_for(engine) as client:
        assert (await client.post("/v1/chat/completions", json=chat(**fields))).status_code == 200
        engine.features -= {feature}
        engine.requests.clear()
        response = await client.post("/v1/chat/completions", json=chat(**fields))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "not_supported_by_engine", param)
        assert error["message"] == f"The engine of this server (fake) does not support {BY_NAME[feature].words}."
        assert engine.requests == []
        assert (await client.post("/v1/chat/completions", json=chat(priority=0))).status_code == 200


async def test_the_prompt_s_log_probabilities_of_an_echo() -> None:
    engine = FakeEngine()
    engine.features -= {"prompt_logprobs"}
    body = {"model": "m", "prompt": "Hi", "logprobs": 1}
    async with client_for(engine) as client:
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        response = await client.post("/v1/completions", json=body | {"echo": True})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "not_supported_by_engine")


async def test_loading_a_model_over_vllm() -> None:
    configured = settings(engine="vllm", admin_key=("the-key",))
    key = {"authorization": "Bearer the-key"}
    async with client_for(FakeEngine(), configured) as client:
        response = await client.post("/admin/models", headers=key, json={"model": "gemma3-270m"})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "not_supported_by_engine")
        lacks = BY_NAME["runtime_models"].vllm
        assert isinstance(lacks, Lacks) and lacks.why in error["message"]


def test_the_engine_s_name() -> None:
    assert (Settings(engine="vllm").engine_name, Settings(engine="native").engine_name) == ("vllm", "native")
