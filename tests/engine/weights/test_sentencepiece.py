from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.errors import FormatError
from engine.weights.sentencepiece import MAX_MERGE_WORK, Vocabulary, build_tokenizer, derive_merges
from tests.engine.weights.vocabularies import NAMES, golden, model
from tests.golden.texts import SENTENCEPIECE_TEXTS, SPECIAL_TEXTS, TEXTS

PATH = Path("model")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ALL_TEXTS = (*TEXTS, *SPECIAL_TEXTS, *SENTENCEPIECE_TEXTS)


def vocabulary(scores: Mapping[str, float], **changes: Any) -> Vocabulary:
    """<unk> and the given pieces."""
    types = [TokenType.UNKNOWN, *[TokenType.NORMAL] * len(scores)]
    fields = {
        "tokens": ["<unk>", *scores],
        "scores": np.array([0.0, *scores.values()]),
        "types": np.array(types),
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    return Vocabulary(**{**fields, **changes})


def encode(tokenizer: Tokenizer, text: str) -> list[str]:
    tokens: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    return tokens


def joined(scores: Mapping[str, float], text: str) -> list[str]:
    """What SentencePiece does, in so many words: while a pair can be joined, join the best one, or the leftmost."""
    symbols = list(text)
    while True:
        pairs = [(-scores[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_sentencepiece_s(name: str) -> None:
    tokenizer = build_tokenizer(model(name).vocabulary, PATH)
    tokenizer.encode_special_tokens = True  # SentencePiece knows no control tokens in texts
    expected = golden()["sentencepiece"][name]["texts"]
    assert len(expected) == len(ALL_TEXTS)
    for text, ids in zip(ALL_TEXTS, expected, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize("name", ["llama", "user_defined"])
def test_what_has_byte_fallback_comes_back_as_it_was(name: str) -> None:
    tokenizer = build_tokenizer(model(name).vocabulary, PATH)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


pieces = st.text("ab", min_size=2, max_size=5)
vocabularies = st.lists(pieces, unique=True, max_size=25).flatmap(
    lambda multi: st.permutations(range(len(multi) + 2)).map(
        lambda order: dict(zip(("a", "b", *multi), map(float, order), strict=True))
    )
)


@given(vocabularies, st.text("ab", max_size=30))
def test_merges_join_as_sentencepiece_does(scores: dict[str, float], text: str) -> None:
    """Any scores, also those where a longer piece beats what it is made of."""
    assert encode(build_tokenizer(vocabulary(scores), PATH), text) == joined(scores, text)


@given(vocabularies)
def test_a_piece_has_the_one_split_by_which_it_is_made(scores: dict[str, float]) -> None:
    tokens = vocabulary(scores)
    merges = derive_merges(tokens.tokens, tokens.scores, tokens.types)
    assert [a + b for a, b in merges] == sorted({a + b for a, b in merges}, key=lambda piece: -scores[piece])
    for piece in scores:
        if len(piece) > 1 and joined(scores, piece) == [piece]:
            assert piece in [a + b for a, b in merges]


def test_overlapping_splits_of_one_piece() -> None:
    # After "xab" and "bay" are out of the way, "aba" could be "ab" "a" or "a" "ba": only one of them ever happens.
    scores = {"a": 0, "b": 0, "ab": 4, "ba": 3, "aba": 2}
    tokens = vocabulary(scores)
    assert derive_merges(tokens.tokens, tokens.scores, tokens.types) == [("a", "b"), ("b", "a"), ("ab", "a")]
    for text in ("aba", "ababa", "baba", "abaaba", "babab"):
        assert encode(build_tokenizer(tokens, PATH), text) == joined(scores, text)


def test_equal_scores_go_by_id() -> None:
    tokens = vocabulary({"a": 0, "b": 0, "c": 0, "bc": -1, "ab": -1})
    assert encode(build_tokenizer(tokens, PATH), "abc") == ["a", "bc"]


def test_only_normal_pieces_are_joined() -> None:
    tokens = vocabulary({"a": 0, "b": 0, "ab": 0, "ba": 0, "abba": 0, "c": 0, "cc": 0})
    types = tokens.types.copy()
    for piece, kind in (("ab", TokenType.UNUSED), ("ba", TokenType.CONTROL), ("cc", TokenType.USER_DEFINED)):
        types[tokens.tokens.index(piece)] = kind
    assert derive_merges(tokens.tokens, tokens.scores, types) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" ", ["\u2581", "\u2581"]),
        ("ab", ["\u2581", "a", "b"]),
        ("<s>ab<s>", ["<s>", "\u2581", "a", "b", "<s>"]),
    ],
)
def test_the_dummy_prefix(text: str, expected: list[str]) -> None:
    scores = {"a": 0, "b": 0, "\u2581": 0, "<s>": 0}
    types = np.array([TokenType.UNKNOWN, *[TokenType.NORMAL] * 3, TokenType.CONTROL])
    assert encode(build_tokenizer(vocabulary(scores, types=types, add_dummy_prefix=True), PATH), text) == expected


def test_extra_spaces_are_removed_and_other_white_space_is_not() -> None:
    tokens = vocabulary({"a": 0, "\u2581": 0, "\n": 0, "\u2581a": 1}, remove_extra_whitespaces=True)
    tokenizer = build_tokenizer(tokens, PATH)
    assert encode(tokenizer, "  a   a \n a  ") == ["a", "\u2581a", "\u2581", "\n", "\u2581a"]
    assert encode(tokenizer, "   ") == []


def test_characters_without_a_piece() -> None:
    assert encode(build_tokenizer(vocabulary({"a": 0}), PATH), "a☠☠a") == ["a", "<unk>", "a"]
    types = np.array([TokenType.UNKNOWN, TokenType.NORMAL, *[TokenType.BYTE] * 256])
    scores = {"a": 0.0, **dict.fromkeys(BYTES, 0.0)}
    assert encode(build_tokenizer(vocabulary(scores, types=types), PATH), "é") == ["<0xC3>", "<0xA9>"]


def test_a_named_unknown_token_is_special() -> None:
    tokens = vocabulary({"a": 0, "<": 0, ">": 0, "<a": 0, "<a>": 0}, types=np.full(6, TokenType.NORMAL), unknown_id=5)
    tokenizer = build_tokenizer(tokens, PATH)
    tokenizer.encode_special_tokens = True
    assert encode(tokenizer, "<a>☠") == ["<a", ">", "<a>"]


@pytest.mark.parametrize(
    ("scores", "changes", "message"),
    [
        ({"a": float("nan")}, {}, r"k\.scores\[1\] must be a finite number, found nan"),
        ({"a": float("-inf")}, {}, r"k\.scores\[1\] must be a finite number, found -inf"),
        ({"a": 0}, {"types": np.array([2, 7])}, r"k\.token_type\[1\] must be from 1 to 6, found 7"),
        ({"a": 0}, {"types": np.array([2, 0])}, r"k\.token_type\[1\] must be from 1 to 6, found 0"),
        ({"a": 0}, {"types": np.array([2, 2])}, r"must have one UNKNOWN piece at most, found ids \[0, 1\]"),
        ({"a": 0}, {"unknown_id": 1}, r"unknown_token_id must be the UNKNOWN piece 0 of k\.token_type, found 1"),
        ({"a": 0}, {"types": np.array([1, 1])}, "256 BYTE pieces or an UNKNOWN one, .* found neither"),
        ({"<0x4G>": 0}, {"types": np.array([2, 6])}, r"tokens\[1\]: a BYTE piece must be .* found '<0x4G>'"),
        ({"<0x4a>": 0}, {"types": np.array([2, 6])}, "found '<0x4a>'"),
        ({"<0x41>": 0}, {"types": np.array([2, 6])}, "must have 256 BYTE pieces or none, found 1"),
        ({"": 0}, {"types": np.array([2, 3])}, r"k\.tokens\[1\]: a control or user-defined token is empty"),
        ({"a": 0}, {"tokens": ["a", "a"]}, r"k\.tokens: 'a' is given twice"),
        ({"a" * 20_000: 0}, {}, f"squared lengths of the pieces may add up to {MAX_MERGE_WORK}, found 400000"),
    ],
)
def test_contradictions(scores: dict[str, float], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        build_tokenizer(vocabulary(scores, **changes), PATH, keys="k.")
    assert caught.value.path == PATH
