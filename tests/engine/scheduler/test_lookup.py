from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.lookup import ROWS, PromptLookup


def test_what_followed_the_last_time_is_guessed() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert PromptLookup().propose([*text, 2, 3, 4], 2) == [5, 6]
    assert PromptLookup().propose([*text, 2, 3, 4], 1) == [5]


def test_three_tokens_that_occurred_say_more_than_two() -> None:
    assert PromptLookup().propose([1, 2, 3, 10, 9, 2, 3, 20, 1, 2, 3], 1) == [10]
    assert PromptLookup().propose([1, 2, 3, 10, 9, 2, 3, 20, 7, 2, 3], 1) == [20]


def test_the_latest_occurrence_counts() -> None:
    assert PromptLookup().propose([1, 2, 3, 10, 1, 2, 3, 20, 1, 2, 3], 1) == [20]


def test_a_period_goes_on() -> None:
    lookup = PromptLookup()
    for _ in range(50):
        lookup.learn(ROWS, ROWS)
    assert lookup.propose([1, 2, 3] * 3, ROWS) == [1, 2, 3, 1, 2, 3, 1, 2]


def test_nothing_is_guessed_of_what_never_occurred() -> None:
    for tokens in ([], [1], [1, 1], [1, 2, 3, 4, 5], [7, 1, 8, 1]):
        assert PromptLookup().propose(tokens, ROWS) == []


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(1, 9), min_size=1))
def test_a_lookup_that_grows_with_its_text_guesses_as_a_new_one(text: list[int], pieces: list[int]) -> None:
    grown, end = PromptLookup(), 0
    for piece in pieces:
        end = min(end + piece, len(text))
        assert grown.propose(text[:end], ROWS) == PromptLookup().propose(text[:end], ROWS)


def test_guesses_are_as_long_as_they_pay() -> None:
    tokens = [1, 2, 3] * 20  # 60 tokens
    sure, unsure = PromptLookup(), PromptLookup()
    for _ in range(60):
        sure.propose(tokens, ROWS)
        sure.learn(4, 4)
        unsure.propose(tokens, ROWS)
        unsure.learn(4, 0)
    assert len(sure.propose(tokens, ROWS)) == ROWS
    assert unsure.propose(tokens, ROWS) == []
    # One that has stopped tries again now and then, and goes on when that holds.
    longer = [1, 2, 3] * 60
    assert [n for n in range(60, 160) if unsure.propose(longer[:n], ROWS)] == [64, 96, 128]
    for _ in range(10):
        unsure.learn(1, 1)
    assert unsure.propose(longer[:161], ROWS)


def test_what_was_not_put_to_the_test_does_not_count() -> None:
    """After a wrong token the others of a guess say nothing: one wrong token a time is a rate of a half here."""
    lookup = PromptLookup()
    tokens = [1, 2, 3] * 20
    for _ in range(100):
        lookup.propose(tokens, ROWS)
        lookup.learn(ROWS, 1)
    assert 1 <= len(lookup.propose(tokens, ROWS)) <= 4


def test_a_long_text_is_indexed_once() -> None:
    rng = random.Random(1)
    tokens = [rng.randrange(50_000) for _ in range(10_000)]
    lookup = PromptLookup()
    lookup.propose(tokens, 1)
    indexed = len(lookup._next)
    lookup.propose([*tokens, 5], 1)
    assert len(lookup._next) == indexed + 2
