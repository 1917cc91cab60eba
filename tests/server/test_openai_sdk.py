"""The openai package against a real server, its strict response validation on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from tests.server.fakes import FakeEngine, say
from tests.server.support import listening, settings


@pytest.fixture
async def sdk() -> AsyncIterator[AsyncOpenAI]:
    engine = FakeEngine(lambda request: say(request, f"Hello, {request.choice_index}"))
    async with (
        listening(engine, settings(api_key=("secret",))) as url,
        AsyncOpenAI(base_url=url + "/v1", api_key="secret", max_retries=0, _strict_response_validation=True) as client,
    ):
        yield client


async def test_chat(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model="m",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        n=2,
        temperature=0.5,
        extra_body={"top_k": 5},
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello, 0", "Hello, 1"]
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    # Its own message goes back in as it came out.
    again = await sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Hi"}, answer.choices[0].message.model_dump()],  # type: ignore[list-item]
    )
    assert again.choices[0].finish_reason == "stop"


async def test_streamed_chat(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello, 0"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9


async def test_the_streaming_helper(sdk: AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(model="m", messages=[{"role": "user", "content": "Hi"}]) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, 0"


async def test_completions(sdk: AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="m", prompt=["a", "b"], max_tokens=50)
    assert [choice.text for choice in answer.choices] == ["Hello, 0", "Hello, 0"]
    # The package's own type of these chunks has no null finish_reason, which the API itself sends: no strictness here.
    lenient = AsyncOpenAI(base_url=sdk.base_url, api_key=sdk.api_key, http_client=sdk._client)
    stream = await lenient.completions.create(model="m", prompt="a", max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello"


async def test_models(sdk: AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == ["m"]
    assert (await sdk.models.retrieve("m")).id == "m"


async def test_errors_arrive_as_the_package_knows_them(sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        await sdk.models.retrieve("other")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.chat.completions.create(model="m", messages=[], temperature=1)
    assert (bad.value.param, bad.value.type) == ("messages", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        await sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 100}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="wrong").models.list()
