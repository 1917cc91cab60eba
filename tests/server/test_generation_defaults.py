"""Sampling fields that a request leaves out come from the generation config; what it says itself always wins."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import SamplingParams
from tests.server.fakes import MAX_MODEL_LEN, FakeEngine
from tests.server.support import chat, client_for, settings

ROOM = MAX_MODEL_LEN - 3
DEFAULTS = {
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 50.0,  # as a packed file gives it back
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.4,
    "max_tokens": 20.0,
}


async def sampling_of(body: dict[str, Any], path: str = "/v1/chat/completions", **configured: Any) -> SamplingParams:
    engine = FakeEngine()
    async with client_for(engine, settings(**configured), defaults=DEFAULTS) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return engine.requests[0].sampling


async def test_what_is_left_out_or_null_is_filled_in() -> None:
    expected = SamplingParams(**DEFAULTS | {"top_k": 50, "max_tokens": 20})  # type: ignore[arg-type]
    for body in (chat(), chat(**dict.fromkeys(DEFAULTS))):
        sampling = await sampling_of(body)
        assert sampling == expected
        assert isinstance(sampling.top_k, int) and isinstance(sampling.max_tokens, int)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("temperature", 1),
        ("top_p", 1),
        ("top_k", 0),
        ("top_k", 5),
        ("min_p", 0),
        ("repetition_penalty", 1),
        ("presence_penalty", 0),
        ("frequency_penalty", 0),
        ("max_tokens", 21),
        ("max_completion_tokens", 3),
    ],
)
async def test_a_requests_own_value_wins(field: str, value: float) -> None:
    sampling = await sampling_of(chat(**{field: value}))
    name = field.replace("max_completion_tokens", "max_tokens")
    assert getattr(sampling, name) == value
    others = DEFAULTS.keys() - {name}
    assert {other: getattr(sampling, other) for other in others} == {other: DEFAULTS[other] for other in others}


async def test_who_limits_an_answer() -> None:
    assert (await sampling_of(chat(), default_max_tokens=7)).max_tokens == 7  # the operator, over the configuration
    assert (await sampling_of({"model": "m", "prompt": "a"}, "/v1/completions")).max_tokens == 20
    async with client_for(engine := FakeEngine(), defaults={"max_tokens": 1e6}) as client:
        await client.post("/v1/chat/completions", json=chat())
        assert engine.requests[0].sampling.max_tokens == ROOM


async def test_the_models_endpoint_shows_what_is_in_force() -> None:
    async with client_for(FakeEngine(), defaults=DEFAULTS) as client:
        assert (await client.get("/v1/models")).json()["data"][0]["generation_defaults"] == DEFAULTS
        assert (await client.get("/v1/models/m")).json()["generation_defaults"] == DEFAULTS


async def test_equal_fingerprints_mean_equal_defaults() -> None:
    async def fingerprint(defaults: dict[str, float], **configured: Any) -> str:
        async with client_for(FakeEngine(), settings(**configured), defaults=defaults) as client:
            return str((await client.post("/v1/chat/completions", json=chat())).json()["system_fingerprint"])

    plain = await fingerprint({})
    assert await fingerprint({}) == plain
    assert len({plain, await fingerprint(DEFAULTS), await fingerprint({}, default_max_tokens=7)}) == 3
