from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.sampling.bad_words import BadWords

tokens = st.lists(st.integers(0, 2), max_size=8)
words = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=6)


@given(words=words, prompt=tokens, output=tokens, ahead=tokens)
def test_what_would_complete_a_word(
    words: list[list[int]], prompt: list[int], output: list[int], ahead: list[int]
) -> None:
    bad = BadWords(words)
    written = output + ahead
    expected = {word[-1] for word in words if len(word) > 1 and written[-len(word) + 1 :] == word[:-1]}
    assert set(bad.completing(prompt + output, len(prompt), ahead)) == expected
    assert bad.single == {word[0] for word in words if len(word) == 1}
