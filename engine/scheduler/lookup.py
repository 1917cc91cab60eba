"""Prompt lookup: guesses what a sequence says next from what followed its last tokens the last time they occurred.

A step that reads all weights for one token computes a few more for little, so tokens are guessed and computed in the
same step as the token that is known. Whoever guessed right is so many tokens further; what a wrong guess computed is
forgotten. The tokens that are chosen are the same either way: each is chosen from the bits it would have been chosen
from, by the draw of its own position (Leviathan et al., 2023; guesses from the text itself: Saxena, 2023).

Guessing pays where text repeats itself: quotations, code that is edited, summaries, tables. Where it does not, it
stops: each sequence keeps count of how often its guesses hold, and makes no guess that is not worth its row.
"""

from __future__ import annotations

import math

ROWS = 8
"""Tokens of a step, guesses among them: as many rows as one pass over the weights computes. Where more sequences decode
than that, another row costs as much as it can bring."""

ROW_COST = 0.15
"""What a further row costs of a step with one: a guess that holds less often is not made. Measured with the default
model (benchmarks/speculation.py); with larger ones, of whose steps the weights are a larger part, a row costs less."""

FIRST_RATES = {3: 0.5, 2: 0.25}
"""Tokens that must have occurred before, the most telling number first; and how often what followed them then is taken
to follow again before anything is known of a sequence."""

_MEMORY = 0.1  # what the newest guess weighs in the rate
_RETRY = 32  # tokens after which a sequence that has stopped guessing tries one again


class PromptLookup:
    """The guesses of one sequence. Tokens only grow."""

    __slots__ = ("_length", "_next", "_num_indexed", "_rates")

    def __init__(self) -> None:
        self._next: dict[int, int] = {}  # what follows the last occurrence of some tokens, as an index
        self._num_indexed = 0  # tokens that something is known to follow
        self._rates = dict(FIRST_RATES)
        self._length = max(FIRST_RATES)  # of the match that the last guess came from

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` tokens that may follow `tokens`: none where nothing is found or guessing does not pay."""
        end = len(tokens)
        for index in range(max(self._num_indexed, min(FIRST_RATES)), end):
            for length in FIRST_RATES:
                if index >= length:
                    self._next[_key(tokens, index, length)] = index
        self._num_indexed = end
        for length in FIRST_RATES:
            if end >= length and (start := self._next.get(_key(tokens, end, length))) is not None:
                self._length = length
                # What repeats itself with a period goes on doing so.
                return [tokens[start + i % (end - start)] for i in range(min(most, self._worthwhile(length, end)))]
        return []

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        """How many of the tokens last proposed were right; what follows a wrong one was not put to the test."""
        rate = self._rates[self._length]
        for held in [1] * num_accepted + [0] * (num_accepted < num_proposed):
            rate += (held - rate) * _MEMORY
        self._rates[self._length] = rate

    def _worthwhile(self, length: int, position: int) -> int:
        """Tokens, of which the last still holds often enough to pay for its row."""
        rate = self._rates[length]
        if rate < ROW_COST:
            return int(position % _RETRY == 0)
        return ROWS if rate > 0.99 else int(math.log(ROW_COST) / math.log(rate))


def _key(tokens: list[int], end: int, length: int) -> int:
    """The `length` tokens before `end` as one number. Token ids are below 2**31."""
    key = length
    for token in tokens[end - length : end]:
        key = key << 31 | token
    return key
