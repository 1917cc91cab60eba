"""Token sequences that may not come about: each is forbidden at its last token, once the others stand before it."""

from __future__ import annotations

from collections.abc import Sequence


class BadWords:
    """The bad words of one request, found by the token before their last one: work does not grow with their number."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        """`words` are token sequences, none of them empty."""
        self.single = frozenset(word[0] for word in words if len(word) == 1)
        """Tokens that are a whole word: never allowed."""
        self._longest = max((len(word) for word in words), default=0)
        self._after: dict[int, list[tuple[list[int], int]]] = {}  # token before the last -> (all but the last, last)
        for word in words:
            if len(word) > 1:
                self._after.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))

    def completing(self, tokens: Sequence[int], start: int, ahead: Sequence[int] = ()) -> list[int]:
        """The tokens that would complete a word of several after `tokens` from `start` on (the output) and `ahead`.

        Only output counts: a word that the prompt began may be finished.
        """
        if not self._after or not (ahead or len(tokens) > start):
            return []
        candidates = self._after.get(ahead[-1] if ahead else tokens[-1])
        if candidates is None:
            return []
        written = [*tokens[max(start, len(tokens) - self._longest) :], *ahead]
        return [last for head, last in candidates if written[-len(head) :] == head]
