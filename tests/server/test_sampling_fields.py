"""What reaches the engine: parameters, clamps, seeds, choices."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import SamplingParams
from tests.server.fakes import MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine
from tests.server.support import Client, chat, client_for, settings

CHAT = "/v1/chat/completions"
PROMPT = "Hi"
ROOM = MAX_MODEL_LEN - len(PROMPT) - 1  # BOS


async def sampling_of(client: Client, engine: FakeEngine, **fields: Any) -> SamplingParams:
    response = await client.post(CHAT, json=chat(PROMPT, **fields))
    assert response.status_code == 200, response.text
    return engine.requests[-1].sampling


async def test_every_parameter_reaches_the_engine(client: Client, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "min_tokens": 2,
        "max_tokens": 9,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "ignore_eos": True,
    }
    sampling = await sampling_of(client, engine, **fields, logit_bias={"5": -100, "6": 1.5})
    expected = {**fields, "stop": ("a", "b"), "stop_token_ids": (5,), "logit_bias": {5: -100.0, 6: 1.5}}
    assert {name: getattr(sampling, name) for name in expected} == expected


async def test_null_means_the_default(client: Client, engine: FakeEngine) -> None:
    names = (set(SamplingParams.__struct_fields__) | {"n", "seed", "stream", "stream_options"}) - {"max_tokens"}
    sampling = await sampling_of(client, engine, **dict.fromkeys(names))
    assert sampling == SamplingParams(max_tokens=ROOM)


async def test_max_tokens_is_cut_to_the_context(client: Client, engine: FakeEngine) -> None:
    assert (await sampling_of(client, engine)).max_tokens == ROOM
    assert (await sampling_of(client, engine, max_tokens=10**30)).max_tokens == ROOM
    assert (await sampling_of(client, engine, max_tokens=3)).max_tokens == 3
    assert (await sampling_of(client, engine, max_tokens=3, max_completion_tokens=4)).max_tokens == 4


async def test_completions_default_to_sixteen_tokens(client: Client, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"model": "m", "prompt": "a"})
    assert engine.requests[-1].sampling.max_tokens == 16


async def test_the_operator_can_set_max_tokens(engine: FakeEngine) -> None:
    async with client_for(engine, settings(default_max_tokens=5)) as client:
        assert (await sampling_of(client, engine)).max_tokens == 5
        assert (await sampling_of(client, engine, max_tokens=6)).max_tokens == 6
        await client.post("/v1/completions", json={"model": "m", "prompt": "a"})
        assert engine.requests[-1].sampling.max_tokens == 5


async def test_a_larger_top_k_than_the_vocabulary_is_the_vocabulary(client: Client, engine: FakeEngine) -> None:
    assert (await sampling_of(client, engine, top_k=10**30)).top_k == VOCAB_SIZE
    assert (await sampling_of(client, engine, top_k=-1)).top_k == -1


async def test_a_single_stop_string(client: Client, engine: FakeEngine) -> None:
    assert (await sampling_of(client, engine, stop="x")).stop == ("x",)
    assert (await sampling_of(client, engine, stop=["", "y"])).stop == ("y",)
    assert (await sampling_of(client, engine, stop=[])).stop == ()


@pytest.mark.parametrize(
    ("seed", "concrete"),
    [(0, 0), (7, 7), (-1, 2**64 - 1), (2**64, 0), (2**64 + 5, 5), (-(2**70) - 3, 2**64 - 3)],
)
async def test_seeds_are_taken_modulo_two_to_the_64(
    client: Client, engine: FakeEngine, seed: int, concrete: int
) -> None:
    await sampling_of(client, engine, seed=seed)
    assert engine.requests[-1].seed == concrete


async def test_a_seed_is_drawn_where_none_is_given(client: Client, engine: FakeEngine) -> None:
    for _ in range(8):
        await sampling_of(client, engine)
    seeds = {request.seed for request in engine.requests}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


async def test_choices_share_seed_and_group(client: Client, engine: FakeEngine) -> None:
    response = await client.post(CHAT, json=chat(n=3, seed=5))
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2]
    assert [request.choice_index for request in engine.requests] == [0, 1, 2]
    assert {request.seed for request in engine.requests} == {5}
    assert len({request.request_id for request in engine.requests}) == 3
    (group,) = {request.group_id for request in engine.requests}
    assert group


async def test_priority_and_cache_salt(client: Client, engine: FakeEngine) -> None:
    await sampling_of(client, engine)
    await sampling_of(client, engine, priority=-3, cache_salt="a")
    await sampling_of(client, engine, cache_salt="b")
    plain, a, b = engine.requests
    assert (plain.priority, a.priority) == (0, -3)
    assert len({plain.cache_salt, a.cache_salt, b.cache_salt}) == 3


async def test_messages_as_they_come_back(client: Client, engine: FakeEngine) -> None:
    """An answer of ours, and what other servers add to theirs, is a valid message of the next request."""
    answer = (await client.post(CHAT, json=chat())).json()["choices"][0]["message"]
    extras: dict[str, Any] = {
        "annotations": [],
        "audio": None,
        "tool_calls": None,
        "function_call": None,
        "reasoning": "because",
    }
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
            {**answer, **extras},
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}], "reasoning_content": None},
            {"role": "user", "content": "c"},
        ],
    }
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    assert "x-seraph-ignored" not in response.headers
    prompt = "".join(map(chr, engine.requests[-1].prompt_token_ids[1:]))
    assert prompt == "Be brief.a\nbHello, worldnoneverc"


async def test_the_fingerprint_follows_the_weights_and_what_computes_with_them() -> None:
    """Equal fingerprints and seeds promise equal answers."""
    kinds: list[dict[str, str]] = [{}, {"checkpoint_sha256": "a"}, {"checkpoint_sha256": "b"}, {"isa": "avx2"}]
    found = set()
    for changes in [*kinds, {"kv_cache_dtype": "int8"}, {}]:
        engine = FakeEngine()
        engine.known = changes
        async with client_for(engine) as client:
            found.add((await client.post(CHAT, json=chat())).json()["system_fingerprint"])
    assert len(found) == 5
