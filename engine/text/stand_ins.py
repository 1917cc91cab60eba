"""Keeping special tokens out of content while a template is rendered.

A template and the content it is given end up in one string. So that `<|im_end|>` in a message cannot be taken for the
template's own, its first character is replaced before rendering by a stand-in, a character that occurs nowhere in the
request or the template; the tokenizer puts the character back when it encodes that stretch as plain text. Replaced are

* each place where a special token's text begins, in whatever case (templates may change the case of content),
* the ends of a string, also of the string without surrounding space, where they could be completed to a special token
  by what the template or another string puts beside them: "<|im_" before it, "end|>" after it, "im_end" around it.

What this cannot know is a template that takes text out of the inside of a string and so joins what was apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine.errors import RequestError

_STAND_INS = ((0x13000, 0x13430), (0x12000, 0x1239A), (0x20000, 0x2A6E0))
"""Ranges that stand-ins come from: hieroglyphs, cuneiform, rare ideographs. They must be letters: printed, escaped and
stripped as they are, and without case."""

_VERBATIM_KEYS = frozenset({"role", "type"})
"""Their values are words of the API that templates build control tokens from or compare with; only special tokens
inside them are replaced. Roles are checked against a list."""


class SpecialTexts:
    """The texts of a model's special tokens, ready to be searched for."""

    def __init__(self, texts: Iterable[str]) -> None:
        folded = sorted({_folded(text) for text in texts if text}, key=len, reverse=True)
        self._folded = folded
        self._longest = len(folded[0]) if folded else 0
        self._prefixes = frozenset(text[:n] for text in folded for n in range(1, len(text)))
        self._suffixes = frozenset(text[-n:] for text in folded for n in range(1, len(text)))
        self._begins = _beginnings(folded) if folded else None

    def risky_places(self, text: str, *, verbatim: bool = False) -> set[int]:
        """Indices of the characters to replace so that `text` can neither hold nor help to make a special token."""
        if self._begins is None or not text:
            return set()
        places = {match.start() for match in self._begins.finditer(text)}
        if verbatim:
            return places
        for start, end in {(0, len(text)), (len(text) - len(text.lstrip()), len(text.rstrip()))}:
            if start < end:
                places |= self._risky_ends(text, start, end)
        return places

    def _risky_ends(self, text: str, start: int, end: int) -> set[int]:
        places = set()
        head = _folded(text[start : min(end, start + self._longest)])
        tail = _folded(text[max(start, end - self._longest) : end])
        if any(head[:n] in self._suffixes for n in range(1, len(head) + 1)):
            places.add(start)
        places |= {end - n for n in range(1, len(tail) + 1) if tail[-n:] in self._prefixes}
        if end - start < self._longest and any(head in special for special in self._folded):
            places.add(start)
        return places


def _beginnings(texts: Sequence[str]) -> re.Pattern[str]:
    """Matches the first character of each text in any case, overlapping ones too.

    Written character first, so that the search jumps from one candidate to the next.
    """
    rests: dict[str, list[str]] = {}
    for text in texts:
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    choices = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()]
    return re.compile("|".join(choices), re.IGNORECASE)


def _folded(text: str) -> str:
    """Lower case, character by character: str.lower() makes two of some."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)


class ContentGuard:
    """Replaces risky characters in one request's values.

    `strings` are all the texts that are rendered together, the template's source among them: no stand-in occurs in any.
    """

    def __init__(self, special: SpecialTexts, strings: Iterable[str]) -> None:
        self._special = special
        self._strings = strings
        self._used: set[str] | None = None
        self._free: Iterator[str] = iter(())
        self._stand_in_for: dict[str, str] = {}

    @property
    def stand_ins(self) -> Mapping[int, str]:
        """Each stand-in's code point and the character it stands for, as str.translate takes them."""
        return {ord(stand_in): character for character, stand_in in self._stand_in_for.items()}

    def guard(self, value: Any, *, verbatim: bool = False) -> Any:
        """A copy of plain data in which every string, keys of mappings included, is harmless."""
        if isinstance(value, str):
            return self._guard_text(value, verbatim)
        if isinstance(value, Mapping):
            return {
                self.guard(key, verbatim=True): self.guard(item, verbatim=key in _VERBATIM_KEYS)
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self.guard(item, verbatim=verbatim) for item in value]
        return value

    def _guard_text(self, text: str, verbatim: bool) -> str:
        places = self._special.risky_places(text, verbatim=verbatim)
        if not places:
            return text
        characters = list(text)
        for place in places:
            characters[place] = self._stand_in(characters[place])
        return "".join(characters)

    def fresh(self) -> str:
        """A character that occurs nowhere in the request or the template, another one each time."""
        if self._used is None:
            self._used = set().union(*self._strings)
            self._free = (chr(i) for low, high in _STAND_INS for i in range(low, high))
        fresh = next((free for free in self._free if free not in self._used), None)
        if fresh is None:
            raise RequestError("The messages use every rare character that could be set aside for their own text.")
        return fresh

    def _stand_in(self, character: str) -> str:
        if character not in self._stand_in_for:
            self._stand_in_for[character] = self.fresh()
        return self._stand_in_for[character]


def strings_in(value: Any) -> Iterator[str]:
    """Every string in plain data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings_in(item)
