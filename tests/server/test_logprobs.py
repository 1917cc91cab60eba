"""Log-probabilities and token ids in answers, over a scripted engine: shapes, streams, echo, stop strings, bounds."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import FinishReason, Request, TokenDelta, TokenLogprobs
from server.schemas.logprobs import LEAST, LogprobWriter, ScoredToken
from tests.server.fakes import BOS, EOS, FakeEngine, say
from tests.server.support import Client, chat, chunks_of, client_for, text_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def scored(token_id: int, count: int) -> TokenLogprobs:
    """A token's own log-probability is -(its id) / 8; tokens 65, 66, ... are the best."""
    top = [(65 + i, -float(i)) for i in range(count)]
    return TokenLogprobs(token_id, -token_id / 8, token_id, top)


def scored_say(request: Request, text: str) -> list[TokenDelta]:
    """As `say`, with the log-probabilities that the request asks for."""
    sampling = request.sampling
    deltas = [TokenDelta(request_id=request.request_id, position=0, finish_reason=FinishReason.LENGTH)]
    if sampling.max_tokens != 0:
        deltas = say(request, text)
    told = []
    for delta in deltas:
        logprobs = [] if sampling.logprobs is None else [scored(each, sampling.logprobs) for each in delta.token_ids]
        prompt = []
        if sampling.prompt_logprobs is not None and delta.position == 0:
            prompt = [scored(each, sampling.prompt_logprobs) for each in request.prompt_token_ids[1:]]
        told.append(
            TokenDelta(
                request_id=delta.request_id,
                position=delta.position,
                token_ids=delta.token_ids,
                logprobs=logprobs,
                prompt_logprobs=prompt,
                finish_reason=delta.finish_reason,
                stop_token_id=delta.stop_token_id,
            )
        )
    return told


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(lambda request: scored_say(request, "Hello"))


def top(count: int) -> list[dict[str, Any]]:
    return [{"token": chr(65 + i), "logprob": -float(i), "bytes": [65 + i]} for i in range(count)]


def entries(text: str, count: int) -> list[dict[str, Any]]:
    return [{"token": c, "logprob": -ord(c) / 8, "bytes": [ord(c)], "top_logprobs": top(count)} for c in text]


@pytest.mark.parametrize("count", [None, 0, 2, 20])
async def test_a_chat_answer(client: Client, engine: FakeEngine, count: int | None) -> None:
    response = await client.post(CHAT, json=chat(logprobs=True, top_logprobs=count))
    assert response.json()["choices"][0]["logprobs"] == {"content": entries("Hello", count or 0), "refusal": None}
    assert engine.requests[-1].sampling.logprobs == (count or 0)
    assert engine.requests[-1].sampling.prompt_logprobs is None


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}])
async def test_without_logprobs_nothing_is_computed_or_said(
    client: Client, engine: FakeEngine, fields: dict[str, Any]
) -> None:
    answer = (await client.post(CHAT, json=chat(**fields))).json()
    assert answer["choices"][0].keys() == {"index", "message", "logprobs", "finish_reason"}
    assert answer["choices"][0]["logprobs"] is None
    assert answer.keys().isdisjoint({"prompt_logprobs", "prompt_token_ids"})
    assert engine.requests[-1].sampling.logprobs is None


async def test_a_streamed_chat_answer(client: Client) -> None:
    chunks = chunks_of((await client.post(CHAT, json=chat(stream=True, logprobs=True, top_logprobs=1))).text)
    assert text_of(chunks) == {0: "Hello"}
    content = [each for chunk in chunks for each in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert content == entries("Hello", 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completion(client: Client, stream: bool) -> None:
    body = {"model": "m", "prompt": "Hi", "logprobs": 2, "stream": stream}
    got = logprobs_of(await client.post(COMPLETIONS, json=body), stream)
    assert got == {
        "tokens": list("Hello"),
        "token_logprobs": [-ord(c) / 8 for c in "Hello"],
        "text_offset": [0, 1, 2, 3, 4],
        "top_logprobs": [{"A": 0.0, "B": -1.0, c: -ord(c) / 8} for c in "Hello"],
    }


def logprobs_of(response: Any, stream: bool) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    if not stream:
        whole: dict[str, list[Any]] = response.json()["choices"][0]["logprobs"]
        return whole
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(response.text)]
    return {name: [each for part in parts if part for each in part[name]] for name in parts[0]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("prompt", ["Hi", [BOS, 72, 105]])
async def test_echo_scores_the_prompt(
    client: Client, engine: FakeEngine, prompt: Any, max_tokens: int, stream: bool
) -> None:
    body = {"model": "m", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": stream}
    response = await client.post(COMPLETIONS, json=body)
    got, answer = logprobs_of(response, stream), "He"[:max_tokens]
    assert got["tokens"] == [chr(BOS), *"Hi", *answer]
    assert got["token_logprobs"] == [None, *(-ord(c) / 8 for c in "Hi" + answer)]
    assert got["text_offset"][1:] == list(range(2 + max_tokens))[: 2 + len(answer)] or prompt != "Hi"
    assert got["top_logprobs"] == [None, *({"A": 0.0, c: -ord(c) / 8} for c in "Hi" + answer)]
    texts = text_of(chunks_of(response.text)) if stream else {0: response.json()["choices"][0]["text"]}
    assert texts[0].endswith("Hi" + answer)
    sampling = engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.logprobs, sampling.prompt_logprobs) == (max_tokens, 1, 1)


async def test_choices_of_a_prompt_share_its_logprobs(client: Client, engine: FakeEngine) -> None:
    body = {"model": "m", "prompt": ["ab", "c"], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 1}
    choices = (await client.post(COMPLETIONS, json=body)).json()["choices"]
    assert [choice["logprobs"]["tokens"][1:] for choice in choices] == [[*"abH"], [*"abH"], [*"cH"], [*"cH"]]
    assert [request.sampling.prompt_logprobs for request in engine.requests] == [0, None, 0, None]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_prompt_logprobs(client: Client, path: str) -> None:
    body = chat("Hi") if path == CHAT else {"model": "m", "prompt": "Hi"}
    answer = (await client.post(path, json=body | {"prompt_logprobs": 1})).json()
    holder = answer if path == CHAT else answer["choices"][0]
    best = {"logprob": 0.0, "rank": 1, "decoded_token": "A"}
    assert holder["prompt_logprobs"] == [
        None,
        {"72": {"logprob": -9.0, "rank": 72, "decoded_token": "H"}, "65": best},
        {"105": {"logprob": -13.125, "rank": 105, "decoded_token": "i"}, "65": best},
    ]
    assert answer["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids(client: Client, stream: bool) -> None:
    """All that the model chose, as usage counts it: with the token that ended the answer."""
    expected = ([BOS, 72, 105], [*map(ord, "Hello"), EOS])
    for path, body in ((CHAT, chat("Hi")), (COMPLETIONS, {"model": "m", "prompt": "Hi"})):
        response = await client.post(path, json=body | {"return_token_ids": True, "stream": stream})
        if not stream:
            answer = response.json()
            holder = answer if path == CHAT else answer["choices"][0]
            assert (holder["prompt_token_ids"], answer["choices"][0]["token_ids"]) == expected
            assert len(expected[1]) == answer["usage"]["completion_tokens"]
            continue
        chunks = chunks_of(response.text)
        first = chunks[0] if path == CHAT else chunks[0]["choices"][0]
        ids = [each for chunk in chunks for each in chunk["choices"][0].get("token_ids", [])]
        assert (first["prompt_token_ids"], ids) == expected
        assert text_of(chunks) == {0: "Hello"}


async def test_tokens_as_ids(client: Client) -> None:
    body = chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    first = (await client.post(CHAT, json=body)).json()["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["top_logprobs"][0]["token"]) == ("token_id:72", [72], "token_id:65")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "left"), [("l", "He"), ("llo", "He"), ("lo", "Hel"), ("lx", "Hello")])
async def test_stop_strings_cut_logprobs_with_the_text(client: Client, stop: str, left: str, stream: bool) -> None:
    body = {"model": "m", "prompt": "Hi", "logprobs": 0, "stop": stop, "stream": stream}
    response = await client.post(COMPLETIONS, json=body)
    assert "".join(logprobs_of(response, stream)["tokens"]) == left
    if stream:  # never ahead of its text, nor behind it
        for chunk in chunks_of(response.text):
            choice = chunk["choices"][0]
            assert "".join((choice["logprobs"] or {"tokens": []})["tokens"]) == choice["text"]


async def test_held_tokens_come_with_their_text(engine: FakeEngine) -> None:
    """One delta of many tokens, of which the last are held back at first."""
    engine.script = lambda request: [
        TokenDelta(request_id=request.request_id, position=0, token_ids=ids, logprobs=[scored(i, 0) for i in ids])
        if reason is None
        else TokenDelta(request_id=request.request_id, position=4, token_ids=ids, finish_reason=reason)
        for ids, reason in (([*b"abcx"], None), ([], FinishReason.LENGTH))
    ]
    async with client_for(engine) as client:
        body = {"model": "m", "prompt": "Hi", "logprobs": 0, "stop": "cxy", "stream": True}
        chunks = chunks_of((await client.post(COMPLETIONS, json=body)).text)
    parts = [(c["text"], c["logprobs"]["tokens"]) for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [("".join(tokens), text) for text, tokens in parts] == [(text, text) for text, _ in parts]
    assert "".join(text for text, _ in parts) == "abcx"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (CHAT, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 0, "echo": False}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
        (COMPLETIONS, {"return_token_ids": 1}, "return_token_ids"),
    ],
)
async def test_bounds(client: Client, engine: FakeEngine, path: str, fields: dict[str, Any], param: str) -> None:
    body = chat() if path == CHAT else {"model": "m", "prompt": "Hi"}
    response = await client.post(path, json=body | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not engine.requests


class Bytes:
    """A vocabulary in which tokens 1 and 2 are the two halves of a character."""

    def token_bytes(self, token_id: int) -> bytes:
        return (b"a", b"\xc3", b"\xa9")[token_id]


def test_parts_of_a_character_are_written_as_bytes() -> None:
    written = LogprobWriter(Bytes()).chat(
        [ScoredToken(TokenLogprobs(1, float("-inf"), 0, [(2, -0.5)]), 0), ScoredToken(TokenLogprobs(0, -1.0, 1), 0)]
    )
    first, second = written["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("bytes:\\xc3", [0xC3], LEAST)
    assert first["top_logprobs"] == [{"token": "bytes:\\xa9", "logprob": -0.5, "bytes": [0xA9]}]
    assert (second["token"], second["bytes"]) == ("a", [97])
