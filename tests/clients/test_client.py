"""Both clients against a real server; each test runs once with each of them."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from seraph_client import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    AuthenticationError,
    BadRequestError,
    Client,
    Model,
    OverloadedError,
    ProtocolError,
    Retries,
    StreamError,
    Timeouts,
    Usage,
)
from tests.clients.either import Either, chunks_of, close, collect
from tests.clients.scripted_server import (
    ScriptedServer,
    chat_events,
    event,
    fail,
    respond,
    stream,
    whole_chat,
)

AT_ONCE = Retries(base_delay=0.0)


@pytest.fixture(params=[Client, AsyncClient])
async def client(request: pytest.FixtureRequest, server: ScriptedServer) -> AsyncIterator[Either]:
    made = request.param(server.url, api_key="secret", model="m", retries=AT_ONCE)
    yield Either(made)
    await close(made)


async def test_chat(client: Either, server: ScriptedServer) -> None:
    server.script(respond(whole_chat("Paris")))
    answer = await client("chat", "Capital of France?", temperature=0, max_tokens=5)
    assert (answer.text, answer.model, answer.choices[0].finish_reason) == ("Paris", "m", "stop")
    assert answer.usage == Usage(prompt_tokens=7, completion_tokens=3, cached_tokens=4)
    (seen,) = server.seen
    assert (seen.method, seen.path) == ("POST", "/v1/chat/completions")
    assert seen.headers["authorization"] == "Bearer secret"
    assert seen.body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Capital of France?"}],
        "temperature": 0,
        "max_tokens": 5,
    }


async def test_completion_of_several_prompts(client: Either, server: ScriptedServer) -> None:
    choices = [{"index": i, "text": str(i), "finish_reason": "length"} for i in (1, 0)]
    server.script(respond({**whole_chat(""), "choices": choices}))
    answer = await client("complete", ["a", "b"])
    assert [choice.text for choice in answer.choices] == ["0", "1"]
    assert server.seen[0].path == "/v1/completions"
    assert server.seen[0].body == {"model": "m", "prompt": ["a", "b"]}


async def test_models(client: Either, server: ScriptedServer) -> None:
    server.script(respond({"object": "list", "data": [{"id": "a", "max_model_len": 64}, {"id": "b"}]}))
    assert await client("models") == [Model("a", 64), Model("b", None)]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_the_server_s_first_model_is_asked_for_once(kind: Any, server: ScriptedServer) -> None:
    client = Either(kind(server.url))
    server.script(respond({"data": [{"id": "first"}, {"id": "second"}]}), respond(whole_chat("x")))
    await client("chat", "a")
    await client("chat", "b")
    await client("chat", "c", model="own")
    await close(client.client)
    assert [seen.body and seen.body["model"] for seen in server.seen] == [None, "first", "first", "own"]


@pytest.mark.parametrize("step", [1, 7, 1000, 100_000])
async def test_a_stream_however_its_bytes_arrive(client: Either, server: ScriptedServer, step: int) -> None:
    raw = b": keep-alive\n\n".join(chat_events("Où ", "est", " 🙂?"))
    server.script(stream(*(raw[i : i + step] for i in range(0, len(raw), step))))
    streamed = await client("stream_chat", "x")
    chunks = [chunk async for chunk in chunks_of(streamed)]
    assert "".join(chunk.text for chunk in chunks) == "Où est 🙂?"
    assert chunks[-1].finish_reason == "stop"
    assert streamed.usage == Usage(7, 3, 4)
    assert (streamed.id, streamed.model) == ("chatcmpl-1", "m")
    assert server.seen[0].body["stream"] is True


async def test_text_of_a_streamed_completion(client: Either, server: ScriptedServer) -> None:
    head = {"id": "i", "model": "m"}
    events = [
        event({**head, "choices": [{"index": i, "text": t, "finish_reason": None}]})
        for i, t in [(0, "a"), (1, "b"), (0, "c")]
    ]
    server.script(stream(*events, b"data: [DONE]\n\n"))
    streamed = await client("stream_complete", "x", n=2)
    text = streamed.text()
    assert (await text if inspect.isawaitable(text) else text) == "ac"


async def test_a_stream_s_whole_answer(client: Either, server: ScriptedServer) -> None:
    server.script(stream(*chat_events("a", "b", "c")))
    streamed = await client("stream_chat", "x")
    async for chunk in chunks_of(streamed):
        if chunk.text == "a":
            break
    answer = await Either(streamed)("answer")
    assert (answer.text, answer.choices[0].finish_reason) == ("abc", "stop")
    assert answer.usage == streamed.usage == Usage(7, 3, 4)
    server.answers.clear()
    server.script(stream(*chat_events("a", "b")[:2]))
    with pytest.raises(APIConnectionError, match="broke off"):
        await Either(await client("stream_chat", "x"))("answer")


async def test_closing_a_stream_disconnects(client: Either, server: ScriptedServer) -> None:
    server.script(stream(*chat_events("a")[:2], then="wait", server=server))
    streamed = await client("stream_chat", "x")
    async for chunk in chunks_of(streamed):
        if chunk.text == "a":
            break
    assert not server.disconnected.is_set()
    await close(streamed)
    assert server.disconnected.wait(10)
    assert [chunk async for chunk in chunks_of(streamed)] == []


async def test_leaving_the_block_disconnects(server: ScriptedServer) -> None:
    server.script(stream(*chat_events("a")[:2], then="wait", server=server))
    with Client(server.url, model="m") as client, client.stream_chat("x") as streamed:
        next(streamed)
    assert server.disconnected.wait(10)
    server.disconnected.clear()
    async with AsyncClient(server.url, model="m") as other, await other.stream_chat("x") as also:
        await anext(also)
    assert server.disconnected.wait(10)


async def test_a_finished_stream_leaves_its_connection_for_the_next_request(server: ScriptedServer) -> None:
    connected: list[str] = []

    class Counting(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            response = super().handle_request(request)
            connected.append(str(response.extensions["network_stream"].get_extra_info("client_addr")))
            return response

    server.script(stream(*chat_events("a")))
    with Client(server.url, model="m", transport=Counting()) as client:
        assert [client.stream_chat("x").text() for _ in range(3)] == ["a"] * 3
    assert len(set(connected)) == 1


async def test_an_error_in_mid_stream(client: Either, server: ScriptedServer) -> None:
    error = event({"error": {"message": "The engine died.", "type": "server_error", "code": "engine_dead"}})
    server.script(stream(b"".join(chat_events("a")[:2]) + error))
    streamed = await client("stream_chat", "x")
    texts: list[str] = []
    with pytest.raises(StreamError, match="The engine died") as caught:
        await collect(streamed, texts)
    assert texts == ["", "a"]
    assert caught.value.code == "engine_dead"
    assert len(server.seen) == 1


@pytest.mark.parametrize("then", ["end", "break"])
async def test_a_stream_that_breaks_off_is_an_error(client: Either, server: ScriptedServer, then: str) -> None:
    server.script(stream(*chat_events("a", "b")[:2], then=then))
    streamed = await client("stream_chat", "x")
    texts: list[str] = []
    with pytest.raises(APIConnectionError):
        await collect(streamed, texts)
    assert texts == ["", "a"]
    assert len(server.seen) == 1, "an answer that has begun is never asked for again"


@pytest.mark.parametrize("name", ["chat", "stream_chat"])
async def test_errors_before_the_answer(client: Either, server: ScriptedServer, name: str) -> None:
    server.script(fail(400, "temperature must be", param="temperature", headers={"x-request-id": "r1"}), fail(401))
    with pytest.raises(BadRequestError, match="temperature must be") as caught:
        await client(name, "x", temperature=-1)
    assert (caught.value.param, caught.value.request_id) == ("temperature", "r1")
    with pytest.raises(AuthenticationError):
        await client(name, "x")
    assert len(server.seen) == 2


@pytest.mark.parametrize("trouble", [fail(503, headers={"retry-after": "0"}), fail(429)])
@pytest.mark.parametrize("name", ["chat", "stream_chat"])
async def test_trying_again(client: Either, server: ScriptedServer, name: str, trouble: Any) -> None:
    good = respond(whole_chat("ok")) if name == "chat" else stream(*chat_events("ok"))
    server.script(trouble, trouble, good)
    answer = await client(name, "x")
    text = answer.text if name == "chat" else "".join([chunk.text async for chunk in chunks_of(answer)])
    assert text == "ok"
    assert len(server.seen) == 3


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_a_server_that_hangs_up_is_tried_again(kind: Any) -> None:
    num_accepted = 0

    def hang_up(listener: socket.socket) -> None:
        nonlocal num_accepted
        for _ in range(3):
            connection, _ = listener.accept()
            with connection:
                num_accepted += bool(connection.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up, args=[listener])
        thread.start()
        client = Either(kind(f"http://127.0.0.1:{listener.getsockname()[1]}", model="m", retries=AT_ONCE))
        with pytest.raises(APIConnectionError):
            await client("chat", "x")
        thread.join()
        await close(client.client)
    assert num_accepted == 3


async def test_giving_up(client: Either, server: ScriptedServer) -> None:
    server.script(fail(503, "overloaded"))
    with pytest.raises(OverloadedError, match="overloaded"):
        await client("chat", "x")
    assert len(server.seen) == 3


async def test_waits_are_those_the_server_asks_for(server: ScriptedServer) -> None:
    waited: list[float] = []
    server.script(
        fail(503, headers={"retry-after": "7"}), fail(429, headers={"retry-after": "3"}), respond(whole_chat(""))
    )
    with Client(server.url, model="m", sleep=waited.append) as client:
        client.chat("x")
    assert waited == [7, 3]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_nobody_listens(kind: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = Either(kind(f"http://127.0.0.1:{port}", retries=AT_ONCE))
    with pytest.raises(APIConnectionError, match="ConnectError"):
        await client("models")
    assert not await client("is_ready")
    await close(client.client)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_a_server_that_says_nothing(kind: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = Either(kind(url, model="m", timeout=Timeouts(read=0.05)))
        with pytest.raises(APITimeoutError):
            await client("chat", "x")
        await close(client.client)


async def test_readiness(client: Either, server: ScriptedServer) -> None:
    server.script(fail(503, headers={"retry-after": "1"}), respond({"status": "ready"}), fail(401))
    assert not await client("is_ready")
    assert await client("is_ready")
    with pytest.raises(AuthenticationError):
        await client("is_ready")


async def test_an_answer_of_something_else(client: Either, server: ScriptedServer) -> None:
    server.script(respond(b"<html>welcome</html>"))
    with pytest.raises(ProtocolError, match="welcome"):
        await client("chat", "x")


@pytest.mark.parametrize("name", ["chat", "stream_chat"])
async def test_cancelling_a_call_disconnects(server: ScriptedServer, name: str) -> None:
    server.script(stream(*chat_events("a")[:2], then="wait", server=server))
    async with AsyncClient(server.url, model="m") as client:

        async def ask() -> None:
            await collect(await Either(client)(name, "x"), [])

        task = asyncio.create_task(ask())
        assert await asyncio.to_thread(server.arrived.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.disconnected.wait, 10)


@pytest.mark.parametrize("name", ["chat", "stream_chat"])
async def test_the_whole_call_s_time(client: Either, server: ScriptedServer, name: str) -> None:
    server.script(stream(*chat_events("a")[:2], then="wait", server=server))
    texts: list[str] = []
    with pytest.raises(APITimeoutError):
        await collect(await client(name, "x", timeout=0.2), texts)
    assert texts == ([] if name == "chat" else ["", "a"])
    assert await asyncio.to_thread(server.disconnected.wait, 10)
