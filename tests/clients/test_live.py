"""Both clients against a real server."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest

from seraph_client import (
    Answer,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Choice,
    Client,
    ModelFailedError,
    NotFoundError,
    Tool,
)
from tests.clients.either import Either, chunks_of, close
from tests.clients.live import ADMIN_KEY, CONTEXT, KEY, Live
from tests.live import ENGINE, ROOT

TEXTS = ["the river", "what is a mountain?", "bread"]
LONG: dict[str, Any] = {"max_tokens": CONTEXT - 64, "ignore_eos": True}


@pytest.fixture(params=[Client, AsyncClient])
async def client(request: pytest.FixtureRequest, live: Live) -> AsyncIterator[Either]:
    made = request.param(live.url, api_key=KEY, admin_key=ADMIN_KEY)
    yield Either(made)
    await close(made)


async def test_whole_and_streamed_answers_agree(client: Either) -> None:
    whole = await client("chat", "Hi", temperature=0, max_tokens=24, ignore_eos=True)
    stream = await client("stream_chat", "Hi", temperature=0, max_tokens=24, ignore_eos=True)
    assert "".join([chunk.text async for chunk in chunks_of(stream)]) == whole.text
    assert whole.model == stream.model == "tiny"
    assert stream.usage.completion_tokens == whole.usage.completion_tokens == 24
    assert stream.request_id


async def test_choices_of_several_prompts(client: Either) -> None:
    options: dict[str, Any] = {"n": 2, "seed": 7, "temperature": 1, "max_tokens": 8, "ignore_eos": True}
    whole = await client("complete", [[5, 6, 7], [8, 9]], **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage.prompt_tokens == 5
    texts = [""] * 4
    async for chunk in chunks_of(await client("stream_complete", [[5, 6, 7], [8, 9]], **options)):
        texts[chunk.index] += chunk.text
    assert texts == [choice.text for choice in whole.choices]


TURN: Tool = {
    "type": "function",
    "function": {
        "name": "turn",
        "description": "Turn the ship",
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["left", "right"]}, "by": {"type": "integer", "minimum": 1, "maximum": 99}},
            "required": ["to", "by"],
            "additionalProperties": False,
        },
    },
}
CALLS: dict[str, Any] = {"tools": [TURN], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}


async def streamed(client: Either, name: str, *args: Any, **options: Any) -> Answer:
    """The whole answer of a stream."""
    answer: Answer = await Either(await client(f"stream_{name}", *args, **options))("answer")
    return answer


def without_ids(choices: Iterable[Choice]) -> list[Choice]:
    """Choices whose calls have no ids: those of two answers differ."""
    return [replace(each, tool_calls=tuple(replace(call, id="") for call in each.tool_calls)) for each in choices]


INVARIANT = pytest.mark.native("answers that do not depend on what else is computed")


@INVARIANT
async def test_calls_of_tools_whole_and_streamed(client: Either) -> None:
    question = [{"role": "user", "content": "Turn!"}]
    options: dict[str, Any] = {**CALLS, "n": 2, "seed": 3, "temperature": 1, "logprobs": True, "return_token_ids": True}
    whole = await client("chat", question, **options)
    assert [choice.finish_reason for choice in whole.choices] == ["tool_calls"] * 2
    for choice in whole.choices:
        (call,) = choice.tool_calls
        jsonschema.validate(json.loads(call.arguments), TURN["function"]["parameters"])
        assert (call.name, choice.text) == ("turn", "")
        assert len(choice.logprobs) == len(choice.token_ids) - 1, "of all but what ended it"
    assert without_ids((await streamed(client, "chat", question, **options)).choices) == without_ids(whole.choices)
    (call,) = whole.tool_calls
    messages = [*question, whole.message, call.result("Turned.")]
    onward = await client("chat", messages, tools=[TURN], tool_choice="none", temperature=0, max_tokens=8)
    assert onward.text and onward.tool_calls == ()
    assert len(await client("tokenize", question, tools=[TURN])) == whole.usage.prompt_tokens


async def test_a_tool_that_is_not_there(client: Either) -> None:
    with pytest.raises(BadRequestError) as caught:
        await client("chat", "x", tools=[TURN], tool_choice={"type": "function", "function": {"name": "stop"}})
    assert caught.value.param == "tool_choice"


async def test_forms_of_answers(client: Either) -> None:
    schema = {"enum": ["left", "right"]}
    form = {"type": "json_schema", "json_schema": {"name": "side", "schema": schema}}
    assert (await client("chat", "x", response_format=form, max_tokens=50)).text.strip() in ('"left"', '"right"')
    chosen = await client("complete", "x", structured_outputs={"choice": ["left", "right"]}, max_tokens=50)
    assert chosen.text in ("left", "right")


async def test_logprobs_whole_and_streamed(client: Either) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    whole = await client("chat", "Hi", logprobs=True, top_logprobs=2, **options)
    (choice,) = whole.choices
    assert b"".join(each.raw for each in choice.logprobs).decode(errors="replace").startswith(choice.text)
    assert [len(each.top) for each in choice.logprobs] == [2] * len(choice.token_ids)
    assert all(each.top[0].logprob == each.logprob >= each.top[1].logprob for each in choice.logprobs)
    assert (await streamed(client, "chat", "Hi", logprobs=True, top_logprobs=2, **options)).choices == whole.choices
    assert len(choice.prompt_token_ids) == whole.usage.prompt_tokens
    prompts = [[5, 6, 7], [8, 9]]
    whole = await client("complete", prompts, logprobs=1, **options)
    assert (await streamed(client, "complete", prompts, logprobs=1, **options)).choices == whole.choices
    assert [choice.prompt_token_ids for choice in whole.choices] == [(5, 6, 7), (8, 9)]
    assert all(each.top and each.offset is not None for choice in whole.choices for each in choice.logprobs)


async def test_logprobs_of_prompts(client: Either) -> None:
    (choice,) = (await client("complete", [5, 6, 7], max_tokens=0, echo=True, logprobs=0)).choices
    first, *scored = choice.logprobs
    assert first.logprob is None
    (other,) = (await client("complete", [5, 6, 7], max_tokens=1, prompt_logprobs=0)).choices
    assert other.prompt_logprobs[0] is None
    own = [each[id] for each, id in zip(other.prompt_logprobs[1:], (6, 7), strict=True)]
    assert [one.logprob for one in own] == [each.logprob for each in scored]
    assert all(one.rank >= 1 for one in own)
    chat = await client("chat", "Hi", n=2, max_tokens=1, prompt_logprobs=1)
    assert [len(choice.prompt_logprobs) for choice in chat.choices] == [chat.usage.prompt_tokens] * 2


async def test_vectors(client: Either) -> None:
    found = await client("embed", TEXTS)
    assert found.model == "minilm"
    assert found.numpy().shape == (3, 96)
    floats = await client("embed", TEXTS, encoding_format="float")
    assert np.array_equal(found.numpy(), floats.numpy())
    assert found.vectors == floats.vectors
    assert found.prompt_tokens == floats.prompt_tokens > 0
    short = await client("embed", "bread", dimensions=8)
    assert np.linalg.norm(short.vectors[0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(BadRequestError) as caught:
        await client("embed", "bread", dimensions=97)
    assert caught.value.param == "dimensions"


async def test_scores(client: Either) -> None:
    scores = (await client("score", "what is water", TEXTS)).scores
    ranking = await client("rerank", "what is water", TEXTS, top_n=2)
    best = sorted(range(3), key=lambda i: -scores[i])[:2]
    assert [(each.index, each.document) for each in ranking.results] == [(i, TEXTS[i]) for i in best]
    exact = ENGINE == "native"  # vLLM's figures depend on what is computed beside them
    assert [each.score for each in ranking.results] == pytest.approx(
        [scores[i] for i in best], rel=0 if exact else 1e-5, abs=0
    )
    bare = await client("rerank", "what is water", TEXTS, return_documents=False)
    assert [each.document for each in bare.results] == [None] * 3


async def test_tokens(client: Either) -> None:
    tokens = await client("tokenize", "The river.")
    assert await client("detokenize", tokens.ids) == "The river."
    assert tokens.max_model_len == CONTEXT
    conversation = await client("tokenize", [{"role": "user", "content": "The river."}])
    answer = await client("chat", "The river.", max_tokens=1)
    assert len(conversation) == answer.usage.prompt_tokens > len(tokens)


async def test_the_server_of_itself(client: Either) -> None:
    assert await client("is_ready")
    assert (await client("health")).models == {}
    assert await client("version")
    kinds = {model.id: (model.kind, model.state) for model in await client("models")}
    assert kinds == {"tiny": ("generate", "ready"), "cross": ("score", "ready"), "minilm": ("embed", "ready")}
    assert (await client("model", "tiny")).max_model_len == CONTEXT
    with pytest.raises(NotFoundError) as caught:
        await client("model", "none")
    assert caught.value.code == "model_not_found" and caught.value.request_id


LOADS = pytest.mark.native("models that come and go while the server runs")


@LOADS
async def test_models_come_and_go(client: Either, live: Live) -> None:
    begun = await client("admin.load", str(live.folder / "bge"), name="second")
    assert begun.name == "second"
    assert (await client("admin.wait_ready", "second", timeout=60, poll=0.05)).kind == "embed"
    assert len((await client("embed", "bread", model="second")).vectors[0]) == 64
    everything = await client("admin.models")
    assert {model.name for model in everything.models} == {"tiny", "minilm", "cross", "second"}
    assert 0 < everything.memory_promised <= everything.memory_limit
    await client("admin.unload", "second", drain=0)
    await client("admin.wait_gone", "second", timeout=60, poll=0.05)
    with pytest.raises(NotFoundError):
        await client("embed", "bread", model="second")


@LOADS
async def test_a_model_that_does_not_load(client: Either, live: Live) -> None:
    (live.folder / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    await client("admin.load", str(live.folder / "broken.gguf"), name="broken")
    with pytest.raises(ModelFailedError, match=r"'broken' failed to load: .*GGUF version"):
        await client("admin.wait_ready", "broken", timeout=60, poll=0.05)
    assert await client("admin.unload", "broken") is None


@LOADS
def test_what_the_readme_shows(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "clients" / "python" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    ours = {
        '"http://127.0.0.1:8000"': f'"{live.url}", api_key="{KEY}"',
        "the-admin-key": ADMIN_KEY,
        "gemma3-270m": str(live.folder / "bge"),
    }
    for written, here in ours.items():
        assert written in readme
        blocks = [block.replace(written, here) for block in blocks]
    for block, printed in zip(blocks, ("Usage(prompt_tokens=", "weather ", "gemma ready None"), strict=True):
        exec(block, {})
        assert printed in capsys.readouterr().out


async def test_wrong_keys(live: Live) -> None:
    with Client(live.url, api_key="wrong", admin_key=KEY) as client:
        with pytest.raises(AuthenticationError):
            client.chat("Hi", model="tiny")
        with pytest.raises(AuthenticationError):
            client.admin.models()


async def test_closing_a_stream_stops_the_server(client: Either, live: Live) -> None:
    stream = await client("stream_chat", "Hi", **LONG)
    async for _ in chunks_of(stream):
        break
    assert live.metric("seraph_engine_num_running") == 1
    await close(stream)
    live.wait_until_idle()


async def test_cancelling_a_call_stops_the_server(live: Live) -> None:
    async with AsyncClient(live.url, api_key=KEY, model="tiny") as client:
        task = asyncio.create_task(client.chat("Hi", **LONG))
        while not await asyncio.to_thread(live.metric, "seraph_engine_num_running"):
            assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(live.wait_until_idle)
