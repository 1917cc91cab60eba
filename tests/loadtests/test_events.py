from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest

from loadtests.events import Heard, listen

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def event(text: str | None = None, **fields: Any) -> bytes:
    choices = [] if text is None else [{"delta": {"content": text}}]
    return b"data: " + json.dumps({"choices": choices, **fields}).encode() + b"\n"


def hear(lines: Iterable[bytes], times: Iterable[float] = itertools.count(1.0)) -> Heard:
    heard, clock = Heard(), iter(times)
    listen(heard, lines, asked_at=0.0, clock=lambda: next(clock))
    return heard


def test_a_whole_answer() -> None:
    lines = [
        b": keep-alive\n",
        b"\n",
        event(""),
        event("a"),
        event("b"),
        event("c"),
        event(usage=USAGE),
        b"data: [DONE]\n",
    ]
    heard = hear(lines, [0.1, 0.5, 0.7, 1.0, 1.1, 1.2])
    assert (heard.text, heard.error) == ("abc", None)
    assert heard.time_to_first_token == 0.5, "the event that only names the role is no token"
    assert heard.gaps == pytest.approx([0.2, 0.3])
    assert (heard.num_tokens, heard.num_prompt_tokens, heard.num_cached_tokens) == (3, 9, 4)


def test_the_server_s_count_wins() -> None:
    assert hear([event("a"), event(usage=USAGE), b"data: [DONE]\n"]).num_tokens == 3
    assert hear([event("a"), event("b"), b"data: [DONE]\n"]).num_tokens == 2


def test_an_answer_that_breaks_off() -> None:
    heard = hear([event("a"), event("b")])
    assert (heard.text, heard.num_tokens, heard.error) == ("ab", 2, "the stream broke off")


def test_an_error_in_the_stream() -> None:
    heard = hear([event("a"), b'data: {"error": {"message": "The engine died."}}\n', event("b")])
    assert (heard.text, heard.error) == ("a", "The engine died.")


@pytest.mark.parametrize("data", [b"rubbish", b"3", b"{}", b'{"choices": 3}', b'{"error": 3}', b'{"choices":[{}]}'])
def test_what_is_no_event(data: bytes) -> None:
    assert (hear([b"data: " + data + b"\n"]).error or "").startswith("not an event of the API: ")
