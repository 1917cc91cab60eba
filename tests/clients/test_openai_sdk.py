"""The openai package against a real server, its strict response validation on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam, ChatCompletionToolParam

from tests.clients.live import CONTEXT, KEY, Live

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
LONG: dict[str, Any] = {"max_tokens": CONTEXT - 64, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def sdk(live: Live) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True, timeout=60
    ) as made:
        yield made


@pytest.fixture
async def async_sdk(live: Live) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True, timeout=60
    ) as made:
        yield made


@pytest.fixture(scope="module")
def lenient(sdk: OpenAI) -> OpenAI:
    """For what the package's own types do not admit: streamed completions, whose finish_reason is null until the last
    chunk, and vectors as base64.
    """
    return OpenAI(base_url=sdk.base_url, api_key=KEY, max_retries=0, timeout=60)


def ask(sdk: OpenAI, **fields: Any) -> ChatCompletion:
    """A whole answer of at most 16 tokens."""
    answer: ChatCompletion = sdk.chat.completions.create(
        model="tiny", messages=QUESTION, **{"max_tokens": 16, **fields}
    )
    return answer


def texts_of(answer: ChatCompletion) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.message.content or "" for choice in answer.choices]


def streamed(sdk: OpenAI, **fields: Any) -> tuple[list[str], list[ChatCompletionChunk]]:
    """The texts of a streamed answer by choice, and its chunks."""
    fields = {"max_tokens": 16, "stream_options": {"include_usage": True}, **fields}
    stream = sdk.chat.completions.create(model="tiny", messages=QUESTION, stream=True, **fields)
    chunks = list(stream)
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return [texts[index] for index in sorted(texts)], chunks


# Chat


@pytest.mark.native("answers that do not depend on what else is computed")
def test_choices_of_a_seed_whole_and_streamed(sdk: OpenAI) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1}
    whole = texts_of(ask(sdk, **fields))
    assert len(set(whole)) == 3, "siblings differ"
    assert texts_of(ask(sdk, **fields)) == whole
    assert streamed(sdk, **fields)[0] == whole
    assert texts_of(ask(sdk, **{**fields, "seed": 8})) != whole


def test_usage_in_a_stream(sdk: OpenAI) -> None:
    usage = ask(sdk, temperature=0).usage
    _, chunks = streamed(sdk, temperature=0)
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {last.id}
    assert chunks[0].choices[0].delta.role == "assistant"
    _, bare = streamed(sdk, temperature=0, stream_options=openai.omit)
    assert all(chunk.choices and chunk.usage is None for chunk in bare), "not asked for, not sent"
    _, counting = streamed(sdk, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in counting if chunk.usage is not None]
    assert len(counts) == len(counting) and counts == sorted(counts)


def test_a_stop_string(sdk: OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
    (whole,) = texts_of(ask(sdk, **fields))
    stop = whole[len(whole) // 2 :][:2]
    answer = ask(sdk, stop=[stop, "never to be seen"], **fields)
    assert texts_of(answer) == [whole.split(stop)[0]]
    assert answer.choices[0].finish_reason == "stop"
    assert streamed(sdk, stop=stop, **fields)[0] == texts_of(answer)
    assert ask(sdk, **fields, extra_body={"ignore_eos": True}).choices[0].finish_reason == "length"


def test_logit_bias(sdk: OpenAI) -> None:
    only = ask(sdk, logit_bias={"66": 100}, temperature=0, max_tokens=5)
    (text,) = texts_of(only)
    assert len(text) > 1 and set(text) == {text[0]}, "one token, over and over"
    assert streamed(sdk, logit_bias={"66": 100}, temperature=0, max_tokens=5)[0] == [text]
    without = texts_of(ask(sdk, logit_bias={"66": -100}, temperature=0, max_tokens=16))[0]
    assert text[0] not in without
    with pytest.raises(openai.BadRequestError) as caught:
        ask(sdk, logit_bias={"9999999": 1})
    assert caught.value.param == "logit_bias"


def test_the_streaming_helper(sdk: OpenAI) -> None:
    stop = texts_of(ask(sdk, temperature=0))[0][-2:]  # the helper takes an answer of full length for a broken one
    with sdk.chat.completions.stream(
        model="tiny", messages=QUESTION, temperature=0, stop=stop, stream_options={"include_usage": True}
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    whole = ask(sdk, temperature=0, stop=stop)
    assert "".join(pieces) == final.choices[0].message.content == texts_of(whole)[0]
    assert final.usage is not None and whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_raw_answers_carry_the_request_id(sdk: OpenAI) -> None:
    raw = sdk.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, max_tokens=1, extra_headers={"x-request-id": "my-request"}
    )
    assert raw.headers["x-request-id"] == raw.parse()._request_id == "my-request"


# Calls of tools

TOOL: ChatCompletionToolParam = {
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
        "strict": True,
    },
}


def test_calls_of_tools(sdk: OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
    }
    (choice,) = ask(sdk, **fields).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "turn" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert arguments["to"] in ("left", "right") and 1 <= arguments["by"] <= 99
    with sdk.chat.completions.stream(model="tiny", messages=QUESTION, **fields) as stream:
        events = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (streamed,) = stream.get_final_completion().choices
    assert "".join(event.arguments_delta for event in events) == call.function.arguments
    assert streamed.finish_reason == "tool_calls" and streamed.message.tool_calls is not None
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    assert streamed.message.tool_calls[0].function.name == "turn"
    sent_back = cast(ChatCompletionMessageParam, choice.message.to_dict())
    onward = sdk.chat.completions.create(
        model="tiny",
        messages=[*QUESTION, sent_back, {"role": "tool", "tool_call_id": call.id, "content": "Turned."}],
        tools=[TOOL],
        tool_choice="none",
        temperature=0,
        max_tokens=8,
    )
    assert onward.choices[0].message.content and not onward.choices[0].message.tool_calls


# Completions


@pytest.mark.native("answers that do not depend on what else is computed")
def test_completions_whole_and_streamed(sdk: OpenAI, lenient: OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["The river", "Bread"],
        "n": 2,
        "seed": 3,
        "temperature": 1,
        "max_tokens": 8,
    }
    whole: Completion = sdk.completions.create(**fields)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    stream = lenient.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    texts = [""] * 4
    reasons: dict[int, str] = {}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_completions_with_echo_stop_and_bias(sdk: OpenAI) -> None:
    def text(**fields: Any) -> str:
        answer: Completion = sdk.completions.create(
            model="tiny", prompt="The river", temperature=0, max_tokens=12, **fields
        )
        return answer.choices[0].text

    plain = text()
    assert text(echo=True) == "The river" + plain
    stop = plain[len(plain) // 2 :][:2]
    assert text(stop=stop) == plain.split(stop)[0]
    assert len(set(text(logit_bias={"66": 100}))) == 1
    ids = sdk.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=1).usage
    assert ids is not None and ids.prompt_tokens == 3


# Everything else


def test_embeddings(sdk: OpenAI, lenient: OpenAI) -> None:
    texts = ["water", "bread and water"]
    # The package asks for base64 by itself, decodes it, and has no type for what it asks for.
    by_default = lenient.embeddings.create(model="minilm", input=texts)
    floats = sdk.embeddings.create(model="minilm", input=texts, encoding_format="float", user="me")
    assert [each.index for each in floats.data] == [0, 1]
    assert np.allclose([each.embedding for each in by_default.data], [each.embedding for each in floats.data])
    assert floats.usage.prompt_tokens == floats.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="does not support embeddings"):
        sdk.embeddings.create(model="tiny", input="water")


def test_models(sdk: OpenAI) -> None:
    listed = {model.id: model for model in sdk.models.list()}
    assert set(listed) == {"tiny", "minilm", "cross"}
    assert sdk.models.retrieve("minilm") == listed["minilm"]
    assert listed["tiny"].to_dict()["kind"] == "generate"


def test_errors_arrive_as_the_package_knows_them(sdk: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="none", messages=QUESTION)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(sdk, temperature=7)
    assert (wrong.value.param, wrong.value.type, wrong.value.status_code) == (
        "temperature",
        "invalid_request_error",
        400,
    )
    with pytest.raises(openai.BadRequestError) as long:
        sdk.completions.create(model="tiny", prompt="water " * CONTEXT)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as early:
        ask(sdk, n=0, stream=True)
    assert early.value.param == "n", "an error before the first chunk has its own status"
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        ask(sdk, user="x" * (33 << 20))
    assert large.value.status_code == 413


def test_a_timeout_ends_the_call_and_the_work(sdk: OpenAI, live: Live) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask(sdk.with_options(timeout=0.3), **LONG)
    live.wait_until_idle()


def test_closing_a_stream_ends_the_work(sdk: OpenAI, live: Live) -> None:
    with sdk.chat.completions.create(model="tiny", messages=QUESTION, stream=True, **LONG) as stream:
        next(iter(stream))
        assert live.metric("seraph_engine_num_running") == 1
    live.wait_until_idle()


async def test_cancelling_a_call_ends_the_work(async_sdk: AsyncOpenAI, live: Live) -> None:
    task = asyncio.create_task(async_sdk.chat.completions.create(model="tiny", messages=QUESTION, **LONG))
    while not await asyncio.to_thread(live.metric, "seraph_engine_num_running"):
        assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(live.wait_until_idle)


async def test_many_at_once(async_sdk: AsyncOpenAI) -> None:
    async def one(seed: int) -> str:
        answer = await async_sdk.chat.completions.create(
            model="tiny", messages=QUESTION, seed=seed, temperature=1, max_tokens=12
        )
        return answer.choices[0].message.content or ""

    together = await asyncio.gather(*map(one, range(8)))
    assert [await one(seed) for seed in range(8)] == together
