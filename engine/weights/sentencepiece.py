"""A `tokenizers` tokenizer from a SentencePiece BPE vocabulary: pieces, scores and kinds, without a list of merges.

SentencePiece joins, again and again, the two neighbours whose joint piece scores highest, the leftmost among equals.
`derive_merges` finds the list of merges with which byte-pair encoding does the same.

Source: Kudo and Richardson, "SentencePiece", EMNLP 2018, and the behaviour of its reference implementation 0.2.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import TokenType
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from engine.errors import FormatError

SPACE = "\u2581"
"""How pieces write a space."""

MAX_MERGE_WORK = 1 << 28
"""Bound on the sum of squared piece lengths, which is what deriving merges costs. Llama 2 has 2 million."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What a SentencePiece BPE model is made of."""

    tokens: Sequence[str]  # the text of each piece, by id
    scores: NDArray[np.floating]  # [len(tokens)], higher is joined earlier
    types: NDArray[np.integer]  # [len(tokens)], of gguf.TokenType
    add_dummy_prefix: bool  # a text begins with a space of its own
    remove_extra_whitespaces: bool  # spaces at the ends are dropped, several become one
    unknown_id: int | None = None  # where no piece is of type UNKNOWN


def build_tokenizer(vocabulary: Vocabulary, path: Path, *, keys: str = "") -> Tokenizer:
    """The tokenizer of a vocabulary; it adds no BOS.

    A text, which for a tokenizer is also each stretch between two added tokens, begins with the dummy prefix where the
    vocabulary wants one. So it is in Meta's and Mistral's own encoding of conversations, which encode each turn by
    itself, and in Hugging Face's Llama tokenizer. SentencePiece differs in one thing: to it, a stretch beside a
    USER_DEFINED piece is no text of its own. UNUSED pieces are never produced, and build no other piece.

    Raises FormatError, with `keys` before the key's name, for a vocabulary that contradicts itself.
    """
    _check(vocabulary, path, keys)
    tokens = list(vocabulary.tokens)
    user_defined = np.flatnonzero(vocabulary.types == TokenType.USER_DEFINED).tolist()
    for token_id in user_defined:  # they are looked for in the text as it comes, which writes spaces as spaces
        tokens[token_id] = tokens[token_id].replace(SPACE, " ")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise FormatError(f"{keys}tokens: {twice!r} is given twice", path=path)
    unknown = _unknown(vocabulary, path, keys)
    types = vocabulary.types.copy()
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    has_bytes = _has_bytes(vocabulary, path, keys)
    if unknown is None and not has_bytes:
        raise FormatError(
            f"{keys}token_type must have 256 BYTE pieces or an UNKNOWN one, for characters without a piece: "
            "found neither",
            path=path,
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=derive_merges(tokens, vocabulary.scores, types),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )
    tokenizer.normalizer = _normalizer(vocabulary)
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_dummy_prefix or vocabulary.remove_extra_whitespaces else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = np.flatnonzero((types == TokenType.CONTROL) | (types == TokenType.UNKNOWN)).tolist()
    for token_id in (*special, *user_defined):
        if not tokens[token_id]:
            raise FormatError(f"{keys}tokens[{token_id}]: a control or user-defined token is empty", path=path)
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    tokenizer.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in user_defined])
    assert tokenizer.get_vocab_size(with_added_tokens=True) == len(tokens)
    return tokenizer


def derive_merges(
    tokens: Sequence[str], scores: NDArray[np.floating], types: NDArray[np.integer]
) -> list[tuple[str, str]]:
    """The merges that join NORMAL pieces in SentencePiece's order, best first.

    A piece with several splits into two pieces gets the one by which it is ever joined. There is only one: whatever
    surrounds a piece, what happens inside it until it is whole is what happens when it is encoded alone. Leaving the
    others out settles ties too. Where two splits of "aba" overlap, as in "ab" "a" "ba", their ranks would have to be
    equal for the leftmost to win, and merges cannot be equal.

    Pieces of equal score, which no trained model has but extended ones do, are ranked by their ids. SentencePiece would
    take the leftmost of two that overlap, which no list of merges can say.
    """
    normal = np.flatnonzero(types == TokenType.NORMAL)
    order = [tokens[i] for i in normal[np.argsort(-scores[normal], kind="stable")].tolist()]
    ranks = {piece: rank for rank, piece in enumerate(order)}
    merges = []
    for piece in order:
        splits = [at for at in range(1, len(piece)) if piece[:at] in ranks and piece[at:] in ranks]
        if len(splits) > 1:
            splits = _last_split(piece, ranks)
        merges += [(piece[:at], piece[at:]) for at in splits]
    return merges


def _last_split(piece: str, ranks: Mapping[str, int]) -> list[int]:
    """Where the last of the merges that make `piece` out of its characters joins; [] where they do not make it."""
    symbols = list(piece)
    if not all(symbol in ranks for symbol in symbols):
        return []
    never = len(ranks)
    joined = [ranks.get(left + right, never) for left, right in itertools.pairwise(symbols)]
    while len(symbols) > 2:
        best = min(joined)
        if best == never:
            return []
        at = joined.index(best)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        del joined[at]
        if at > 0:
            joined[at - 1] = ranks.get(symbols[at - 1] + symbols[at], never)
        if at < len(joined):
            joined[at] = ranks.get(symbols[at] + symbols[at + 1], never)
    return [len(symbols[0])]


def _normalizer(vocabulary: Vocabulary) -> normalizers.Normalizer:
    prepend = [normalizers.Prepend(SPACE)] if vocabulary.add_dummy_prefix else []  # nothing before an empty text
    escape = normalizers.Replace(" ", SPACE)
    if not vocabulary.remove_extra_whitespaces:
        return normalizers.Sequence([*prepend, escape])
    # Of what stands for a space in the text itself, only what ends it is removed.
    at_start, between = normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")
    return normalizers.Sequence([at_start, between, *prepend, escape, normalizers.Replace(Regex(SPACE + r"+\z"), "")])


def _check(vocabulary: Vocabulary, path: Path, keys: str) -> None:
    tokens, scores, types = vocabulary.tokens, vocabulary.scores, vocabulary.types
    assert len(tokens) == len(scores) == len(types)
    for token_id in np.flatnonzero(~np.isfinite(scores))[:1].tolist():
        raise FormatError(f"{keys}scores[{token_id}] must be a finite number, found {scores[token_id]}", path=path)
    for token_id in np.flatnonzero((types < TokenType.NORMAL) | (types > TokenType.BYTE))[:1].tolist():
        raise FormatError(f"{keys}token_type[{token_id}] must be from 1 to 6, found {types[token_id]}", path=path)
    work = sum(len(tokens[i]) ** 2 for i in np.flatnonzero(types == TokenType.NORMAL).tolist())
    if work > MAX_MERGE_WORK:
        raise FormatError(
            f"{keys}tokens: the squared lengths of the pieces may add up to {MAX_MERGE_WORK}, found {work}", path=path
        )


def _unknown(vocabulary: Vocabulary, path: Path, keys: str) -> int | None:
    """The piece for what no other piece can write."""
    marked = np.flatnonzero(vocabulary.types == TokenType.UNKNOWN).tolist()
    if len(marked) > 1:
        raise FormatError(f"{keys}token_type must have one UNKNOWN piece at most, found ids {marked[:5]}", path=path)
    named = vocabulary.unknown_id
    if marked and named not in (None, *marked):
        raise FormatError(
            f"{keys}unknown_token_id must be the UNKNOWN piece {marked[0]} of {keys}token_type, found {named}",
            path=path,
        )
    return marked[0] if marked else named


def _has_bytes(vocabulary: Vocabulary, path: Path, keys: str) -> bool:
    """Whether there are pieces for bytes: for each of the 256, or for none."""
    byte_ids = np.flatnonzero(vocabulary.types == TokenType.BYTE).tolist()
    for token_id in byte_ids:
        if not _BYTE.fullmatch(vocabulary.tokens[token_id]):
            raise FormatError(
                f"{keys}tokens[{token_id}]: a BYTE piece must be written <0x00> to <0xFF>, "
                f"found {vocabulary.tokens[token_id][:64]!r}",
                path=path,
            )
    if byte_ids and len(byte_ids) != 256:
        raise FormatError(f"{keys}token_type must have 256 BYTE pieces or none, found {len(byte_ids)}", path=path)
    return bool(byte_ids)
