"""Token ids to text as they come: whole characters only, and nothing that may still be taken back by a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from engine.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice.

    What `push` and `flush` return, joined, is `Tokenizer.decode` of the tokens pushed, as text after a prompt, cut
    before the first stop string (after it, with `include_stop`). The first is the one that ends first, and among those
    that end together the one that begins first. One that ends within the first `min_tokens` tokens does not count. Work
    per token does not depend on how many came before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """`shown` are special tokens that are text all the same. Raises ValueError for an empty stop string."""
        if not all(stop):
            raise ValueError("stop strings must not be empty")
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_token_ids - shown if skip_special else frozenset[int]()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        # Longest first: the first in this order to end at a character begins earliest.
        self._matchers = [_Matcher(text) for text in sorted(set(stop), key=len, reverse=True)]
        self._held = ""  # decoded, and possibly the start of a stop string
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self.num_tokens = 0
        """Tokens pushed until now, or until the stop string was complete: what usage counts."""
        self.num_characters = 0
        """Characters of all tokens pushed, given out or not."""
        self.stop_string: str | None = None
        """The stop string that ended the text."""

    @property
    def stopped(self) -> bool:
        """A stop string was found: nothing more will come, and nothing more may be pushed."""
        return self.stop_string is not None

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain by now. The id must be below the vocabulary's size."""
        assert self.stop_string is None, "pushed after a stop string"
        self.num_tokens += 1
        if token_id in self._skipped:
            return ""
        text = self._decode(self._pieces[token_id])
        self.num_characters += len(text)
        return self._release(text) if self._matchers else text

    def flush(self) -> str:
        """The text held back so far; the tokens have ended. A character cut short becomes U+FFFD."""
        if self.stop_string is not None:
            return ""
        text = self._decode(b"", True)
        if not self._matchers:
            return text
        released = self._release(text)
        held, self._held = self._held, ""
        return released + held if self.stop_string is None else released

    def _release(self, text: str) -> str:
        """Add decoded text to what is held; return what no stop string can begin in, or what precedes one."""
        num_before = len(self._held)
        held = self._held + text
        counts = self.num_tokens > self._min_tokens
        for index, character in enumerate(text):
            for matcher in self._matchers:
                # Every matcher sees every character up to the match, also where a match does not count yet.
                if matcher.advance(character) and counts and self.stop_string is None:
                    self.stop_string = matcher.text
            if self.stop_string is not None:
                self._held = ""
                return held[: num_before + index + 1 - (0 if self._include_stop else len(self.stop_string))]
        keep = max(matcher.num_matched for matcher in self._matchers)
        released, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return released


class _Matcher:
    """Knuth, Morris and Pratt's search for one string, fed one character at a time."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # the longest prefix of `text`, not all of it, that what came so far ends with
        # borders[n]: the longest proper prefix of text[:n] that is also its suffix.
        borders = [0, 0]
        length = 0
        for character in text[1:]:
            while length and character != text[length]:
                length = borders[length]
            length += character == text[length]
            borders.append(length)
        self._borders = borders

    def advance(self, character: str) -> bool:
        """Take a character; True where it completes the string."""
        matched = self.num_matched
        while matched and self.text[matched] != character:
            matched = self._borders[matched]
        matched += self.text[matched] == character
        complete = matched == len(self.text)
        self.num_matched = self._borders[matched] if complete else matched
        return complete
