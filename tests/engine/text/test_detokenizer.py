from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.text import Detokenizer, Tokenizer
from tests.engine.text.byte_tokenizers import NUM_PLAIN, byte_tokenizer

END = NUM_PLAIN
token_ids = st.lists(st.integers(0, NUM_PLAIN), max_size=40)  # bytes at random, merges and the special token


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_tokenizer(["<|end|>"], ["日本"]).to_str())


def ids_of(text: str) -> list[int]:
    return tokenizer().encode_text(text)


def run(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    """What each push gives, then what the flush gives."""
    given_texts = []
    for token_id in ids:
        given_texts.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            return given_texts
    return [*given_texts, detokenizer.flush()]


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` before the stop string that ends first, and among those the longest."""
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)]
    return text


@given(token_ids)
def test_pieces_join_to_the_whole(ids: list[int]) -> None:
    assert "".join(run(Detokenizer(tokenizer()), ids)) == tokenizer().decode(ids)
    shown = Detokenizer(tokenizer(), skip_special=False)
    assert "".join(run(shown, ids)) == tokenizer().decode(ids, skip_special=False)


@given(st.text())
def test_no_character_is_ever_broken(text: str) -> None:
    emitted = ""
    detokenizer = Detokenizer(tokenizer())
    for token_id in ids_of(text):
        emitted += detokenizer.push(token_id)
        assert text.startswith(emitted)
    assert emitted == text


def test_a_character_appears_with_its_last_byte() -> None:
    assert run(Detokenizer(tokenizer()), ids_of("é🙂")) == ["", "é", "", "", "", "🙂", ""]


def test_a_character_cut_short_is_replaced_at_the_end() -> None:
    assert run(Detokenizer(tokenizer()), ids_of("a🙂")[:-1]) == ["a", "", "", "", "\ufffd"]


@given(token_ids, st.data())
def test_stop_strings_cut_the_whole_text(ids: list[int], data: st.DataObject) -> None:
    whole = tokenizer().decode(ids)
    inside = st.builds(lambda i, n: whole[i : i + n] or "x", st.integers(0, 40), st.integers(1, 6))
    stop = data.draw(st.lists(inside | st.text("ab\ufffdhello", min_size=1, max_size=4), max_size=3))
    detokenizer = Detokenizer(tokenizer(), stop=stop)
    assert "".join(run(detokenizer, ids)) == cut(whole, stop)
    assert detokenizer.stopped == any(string in whole for string in stop)
    shown = Detokenizer(tokenizer(), stop=stop, include_stop=True)
    assert "".join(run(shown, ids)) == cut(whole, stop) + (shown.stop_string or "")
    assert shown.num_tokens == detokenizer.num_tokens


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
@example("aabaabaaab", ["aabaaab"])
@example("abab", ["bb", "ababb"])
def test_only_the_beginning_of_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(tokenizer(), stop=stop)
    emitted = ""
    for num_pushed, token_id in enumerate(ids_of(text), 1):
        emitted += detokenizer.push(token_id)
        if detokenizer.stopped:
            return
        held = text[:num_pushed].removeprefix(emitted)
        assert len(emitted) + len(held) == num_pushed
        assert not held or any(string.startswith(held) and string != held for string in stop)


def test_a_stop_string_across_tokens() -> None:
    detokenizer = Detokenizer(tokenizer(), stop=["lo wor"])
    assert run(detokenizer, ids_of("hello world")) == ["hel", *[""] * 4]
    assert (detokenizer.stop_string, detokenizer.num_tokens) == ("lo wor", 5)
    assert detokenizer.flush() == ""


def test_the_stop_string_that_ends_first_wins_and_the_longest_of_those() -> None:
    for stop in (["bcd", "bc", "abc"], ["abc", "bc", "bcd"]):
        detokenizer = Detokenizer(tokenizer(), stop=stop)
        assert "".join(run(detokenizer, ids_of("xabcd"))) == "x"
        assert detokenizer.stop_string == "abc"


def test_two_stop_strings_inside_one_token() -> None:
    hello = [tokenizer().encode_text("hello")[0]]
    detokenizer = Detokenizer(tokenizer(), stop=["o", "ll"])
    assert run(detokenizer, hello) == ["he"]
    assert detokenizer.stop_string == "ll"


def test_a_stop_string_of_a_character_that_never_came_whole() -> None:
    detokenizer = Detokenizer(tokenizer(), stop=["\ufffd"])
    assert run(detokenizer, ids_of("a🙂")[:-1]) == ["a", "", "", "", ""]
    assert detokenizer.stop_string == "\ufffd"


def test_what_was_held_comes_out_at_the_end() -> None:
    assert run(Detokenizer(tokenizer(), stop=["abc"]), ids_of("xab")) == ["x", "", "", "ab"]


@pytest.mark.parametrize(
    ("min_tokens", "text", "num_tokens"), [(0, "x", 2), (1, "x", 2), (2, "x.", 3), (3, "x..y", 5), (5, "x..y.", 5)]
)
def test_stop_strings_that_end_within_min_tokens_do_not_count(min_tokens: int, text: str, num_tokens: int) -> None:
    detokenizer = Detokenizer(tokenizer(), stop=["."], min_tokens=min_tokens)
    assert "".join(run(detokenizer, ids_of("x..y."))) == text
    assert detokenizer.num_tokens == num_tokens


def test_a_stop_string_that_begins_within_min_tokens_counts() -> None:
    detokenizer = Detokenizer(tokenizer(), stop=["abc"], min_tokens=2)
    assert run(detokenizer, ids_of("abc")) == ["", "", ""]
    assert detokenizer.stopped


def test_special_tokens_are_counted_and_not_shown() -> None:
    detokenizer = Detokenizer(tokenizer(), stop=["<|end|>"])
    assert run(detokenizer, [*ids_of("a"), END, *ids_of("b")]) == ["a", "", "b", ""]
    assert detokenizer.num_tokens == 3


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        Detokenizer(tokenizer(), stop=["a", ""])


def test_work_per_token_does_not_grow() -> None:
    """A text that always may be the start of a long stop string: quadratic work would take minutes."""
    stop = "a" * 20_000 + "b"
    detokenizer = Detokenizer(tokenizer(), stop=[stop])
    (a,) = ids_of("a")
    before = time.process_time()
    emitted = sum(len(detokenizer.push(a)) for _ in range(40_000))
    assert emitted == 20_000
    assert time.process_time() - before < 10
