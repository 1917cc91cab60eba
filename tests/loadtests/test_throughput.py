"""The closed loop's client against answers that a test writes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from loadtests import throughput
from tests.clients.scripted_server import ScriptedServer, chat_events, fail, respond, running, stream

NUM_TOKENS = 3  # as the script's usage says


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as server:
        yield server


def run(url: str, *, concurrency: int = 1, requests: int = 1, tokens: int = NUM_TOKENS) -> throughput.Figures:
    return asyncio.run(throughput.run(url, "m", concurrency, requests, tokens, first_seed=5))


def test_figures_of_streamed_answers(server: ScriptedServer) -> None:
    server.script(stream(*chat_events("a", "b", "c")))
    figures = run(server.url, concurrency=3, requests=7)
    assert (figures.requests, figures.output_tokens, figures.prompt_tokens, figures.cached_tokens) == (7, 21, 49, 28)
    assert figures.tokens_per_second == pytest.approx(21 / figures.seconds)
    assert 0 < figures.ttft_median < figures.seconds
    assert figures.tpot_median >= 0
    prompts = {seen.body["messages"][0]["content"] for seen in server.seen}
    assert prompts == {throughput.prompt(seed) for seed in range(5, 12)}
    assert {seen.path for seen in server.seen} == {"/v1/chat/completions"}
    assert all(seen.body["stream"] and seen.body["ignore_eos"] and seen.body["max_tokens"] == 3 for seen in server.seen)


def test_lengths_of_answers() -> None:
    assert {throughput.length(seed, 128, 0.0) for seed in range(9)} == {128}
    lengths = [throughput.length(seed, 128, 0.5) for seed in range(400)]
    assert lengths == [throughput.length(seed, 128, 0.5) for seed in range(400)]
    assert 64 <= min(lengths) < 70 and 186 < max(lengths) <= 192
    assert sum(lengths) / 400 == pytest.approx(128, rel=0.05)


@pytest.mark.parametrize("size", [1, 7, 100, 1_000_000])
def test_events_may_be_cut_anywhere(server: ScriptedServer, size: int) -> None:
    whole = b"".join(chat_events("a", "\u00e9\U0001f600", "c" * 20_000))
    server.script(stream(*(whole[at : at + size] for at in range(0, len(whole), size))))
    figures = run(server.url)
    assert (figures.output_tokens, figures.prompt_tokens) == (3, 7)
    assert figures.ttft_median > 0


def test_an_answer_of_another_length_is_an_error(server: ScriptedServer) -> None:
    server.script(stream(*chat_events("a")))
    with pytest.raises(ExceptionGroup) as caught:
        run(server.url, tokens=4)
    assert "expected 4 tokens, got 3" in str(caught.value.exceptions[0])


def test_a_refusal_says_what_the_server_said(server: ScriptedServer) -> None:
    server.script(fail(429, "too many"))
    with pytest.raises(ExceptionGroup) as caught:
        run(server.url)
    assert "status 429" in str(caught.value.exceptions[0])
    assert "too many" in str(caught.value.exceptions[0])


def test_an_answer_that_is_no_stream_is_an_error(server: ScriptedServer) -> None:
    server.script(respond({"choices": []}))
    with pytest.raises(ExceptionGroup) as caught:
        run(server.url)
    assert "expected 3 tokens, got 0" in str(caught.value.exceptions[0])


def test_a_stream_that_breaks_off_is_an_error(server: ScriptedServer) -> None:
    server.script(stream(*chat_events("a", "b")[:2], then="break"))
    with pytest.raises(ExceptionGroup) as caught:
        run(server.url)
    assert isinstance(caught.value.exceptions[0], OSError)


def test_nobody_there_and_no_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url, kind in ((f"http://127.0.0.1:{port}", OSError), ("127.0.0.1:8000", ValueError)):
        with pytest.raises(ExceptionGroup) as caught:
            run(url)
        assert isinstance(caught.value.exceptions[0], kind)
