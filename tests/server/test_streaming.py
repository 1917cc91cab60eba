"""Streams: chunks, usage, stop strings, keep-alive, errors in mid-stream, and disconnects."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from engine.errors import EngineDeadError, EngineOverloadedError
from engine.request import FinishReason, Request, TokenDelta
from tests.server.fakes import FakeEngine, say
from tests.server.support import Client, chat, chunks_of, client_for, listening, settings, text_of

CHAT = "/v1/chat/completions"


def delta(request: Request, position: int, text: str, **fields: Any) -> TokenDelta:
    return TokenDelta(
        request_id=request.request_id, position=position, token_ids=[ord(character) for character in text], **fields
    )


async def test_usage_comes_last_and_only_when_asked(client: Client) -> None:
    response = await client.post(CHAT, json=chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks_of(response.text)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 13


async def test_continuous_usage_grows(client: Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await client.post(CHAT, json=chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks_of(response.text)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == 13


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_are_reported(stream: bool) -> None:
    engine = FakeEngine(
        lambda r: [delta(r, 0, "a", num_cached_tokens=2), delta(r, 1, "b", finish_reason=FinishReason.LENGTH)]
    )
    async with client_for(engine) as client:
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        response = await client.post(CHAT, json=chat(n=2, **options))
    usage = (chunks_of(response.text)[-1] if stream else response.json())["usage"]
    # A prompt counts once, however many choices continue it.
    assert usage == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
async def test_choices_keep_apart(stream: bool, path: str) -> None:
    engine = FakeEngine(lambda request: say(request, f"choice {request.choice_index}"))
    body = chat() if path == CHAT else {"model": "m", "prompt": "Hi"}
    async with client_for(engine) as client:
        response = await client.post(path, json={**body, "n": 3, "stream": stream})
    if stream:
        texts = text_of(chunks_of(response.text))
    else:
        texts = {c["index"]: c["message"]["content"] if path == CHAT else c["text"] for c in response.json()["choices"]}
    assert texts == {0: "choice 0", 1: "choice 1", 2: "choice 2"}


async def test_an_event_is_one_line_by_every_way_to_count() -> None:
    """httpx, for one, ends lines where str.splitlines does."""
    text = "a\x85b\u2028c\u2029d\x0b\x0c\x1c\x1d\x1e\n\r\u00e9"
    engine = FakeEngine(lambda r: [delta(r, 0, text, finish_reason=FinishReason.LENGTH)])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(stream=True))
    assert text_of(chunks_of(response.text)) == {0: text}


async def test_tokens_that_arrive_together_go_out_together() -> None:
    engine = FakeEngine(lambda r: [delta(r, 0, "abc"), delta(r, 3, "def", finish_reason=FinishReason.LENGTH)])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(stream=True))
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks_of(response.text)]
    assert texts in (["", "abc", "def", None], ["", "abcdef", None])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        (["lo, w"], "Hel", 8),
        (["world"], "Hello, ", 12),
        (["xyz"], "Hello, world", 13),
        (["ld!"], "Hello, world", 13),  # held back, and given out at the end
        (["o", "e"], "H", 2),
    ],
)
async def test_stop_strings_across_tokens(
    client: Client, engine: FakeEngine, stream: bool, stop: Sequence[str], text: str, num_tokens: int
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await client.post(CHAT, json=chat(stop=stop, **options))
    if stream:
        chunks = chunks_of(response.text)
        assert text_of(chunks) == {0: text}
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        usage = chunks[-1]["usage"]
    else:
        (choice,) = response.json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        usage = response.json()["usage"]
    assert usage["completion_tokens"] == num_tokens
    # The engine is told to stop where the text did.
    assert bool(engine.aborted) == (num_tokens < 13)


async def test_usage_counts_what_was_delivered() -> None:
    """Tokens after a stop string in the same delta do not count."""
    engine = FakeEngine(lambda r: [delta(r, 0, "abXcdef"), delta(r, 7, "g", finish_reason=FinishReason.LENGTH)])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(stop="X"))
    assert response.json()["choices"][0]["message"]["content"] == "ab"
    assert response.json()["usage"]["completion_tokens"] == 3


async def test_an_error_before_the_first_byte_has_its_own_status() -> None:
    engine = FakeEngine(lambda request: [EngineOverloadedError("full", retry_after=3)])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(stream=True))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "3"
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (lambda r: EngineDeadError("died"), 503, "engine_dead"),
        (lambda r: delta(r, 2, "", finish_reason=FinishReason.ABORT), 503, "engine_dead"),
        (lambda r: delta(r, 2, "", finish_reason=FinishReason.DEADLINE), 504, "deadline_exceeded"),
        (lambda r: delta(r, 2, "", finish_reason=FinishReason.ERROR, error="secret"), 500, "engine_error"),
        (lambda r: delta(r, 2, "", finish_reason=FinishReason.REFUSED, error="none"), 400, "no_token_allowed"),
    ],
)
async def test_an_error_in_mid_stream_is_the_last_event(failure: Any, status: int, code: str) -> None:
    engine = FakeEngine(lambda r: [delta(r, 0, "a"), delta(r, 1, "b"), failure(r)])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(stream=True))
        whole = await client.post(CHAT, json=chat())
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert text_of([json.loads(event) for event in events[:-1]]) == {0: "ab"}  # what came before is delivered
    error = json.loads(events[-1])["error"]
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert whole.status_code == status
    assert whole.json()["error"]["code"] == code


async def test_one_failing_choice_ends_the_others() -> None:
    never = asyncio.Event()
    engine = FakeEngine(lambda r: [EngineDeadError("died")] if r.choice_index else [never])
    async with client_for(engine) as client:
        response = await client.post(CHAT, json=chat(n=3))
    assert response.status_code == 503
    assert engine.running == set()


async def test_keep_alive_comments_while_waiting() -> None:
    go = asyncio.Event()
    engine = FakeEngine(lambda r: [go, *say(r, "ok")])
    comments = 0
    async with (
        listening(engine, settings(keep_alive_interval=0.05)) as url,
        httpx.AsyncClient() as client,
        client.stream("POST", url + CHAT, json=chat(stream=True)) as response,
    ):
        async for line in response.aiter_lines():
            comments += line == ": keep-alive"
            if comments == 2:
                go.set()
    assert comments >= 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_disconnect_aborts(stream: bool, n: int) -> None:
    never, begun = asyncio.Event(), asyncio.Event()

    def script(request: Request) -> list[Any]:
        begun.set()
        return [delta(request, 0, "a"), never]

    engine = FakeEngine(script)
    async with listening(engine) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(chat(stream=stream, n=n)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        writer.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        await begun.wait()
        if stream:
            await reader.readuntil(b'"content":"a"')
        writer.close()
        async with asyncio.timeout(5):
            await engine.idle.wait()
        assert len(engine.aborted) == n
        async with httpx.AsyncClient() as client, asyncio.timeout(5):
            metrics = ""
            while f'requests_total{{method="POST",route="{CHAT}"' not in metrics:
                metrics = (await client.get(url + "/metrics")).text
        assert 'seraph_sequences{model="m"} 0.0' in metrics
        assert f'seraph_http_requests_total{{method="POST",route="{CHAT}",status="499"}} 1.0' in metrics


async def test_a_caller_that_reads_nothing_is_cut_off() -> None:
    engine = FakeEngine(lambda r: [delta(r, i, "x") for i in range(4000)], max_model_len=10_000)
    async with listening(engine, settings(send_timeout=1.0), send_buffer=8192) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(peer, (host, int(port)))
            body = json.dumps(chat(stream=True)).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            await loop.sock_sendall(peer, head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
            async with httpx.AsyncClient() as client, asyncio.timeout(20):
                while 'seraph_sequences{model="m"} 1.0' not in (await client.get(url + "/metrics")).text:
                    pass
                while 'seraph_sequences{model="m"} 0.0' not in (await client.get(url + "/metrics")).text:
                    pass
    assert engine.running == set()


async def test_a_full_house_is_503_and_empties_again() -> None:
    go, full = asyncio.Event(), asyncio.Event()

    def script(request: Request) -> list[Any]:
        if len(engine.requests) == 3:
            full.set()
        return [go, *say(request, "ok")]

    engine = FakeEngine(script)
    async with client_for(engine, settings(max_num_seqs=2, max_num_batched_tokens=512, max_waiting=1)) as client:
        waiting = [asyncio.create_task(client.post(CHAT, json=chat())) for _ in range(3)]
        await full.wait()
        for stream in (False, True):
            refused = await client.post(CHAT, json=chat(stream=stream))
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
        go.set()
        assert [(await task).status_code for task in waiting] == [200, 200, 200]
        assert (await client.post(CHAT, json=chat())).status_code == 200
        assert 'seraph_refused_requests_total{model="m"} 2.0' in (await client.get("/metrics")).text
