"""A `tokenizers` tokenizer from GGUF metadata.

The tokenizer never adds BOS itself: `ModelInfo.add_bos` says whether plain text gets one. EOS is never appended to a
prompt, which is there to be continued.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.errors import FormatError, UnsupportedModelError

END_NAMES = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "</s>",
        "<eos>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<end_of_utterance>",
        "<EOT>",
    }
)
"""Tokens that end a turn or a text wherever a checkpoint has them as control tokens."""

_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How `tokenizer.ggml.pre` cuts text before byte pairs are merged."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False  # a piece that is a token by itself is taken whole
    add_bos: bool = False  # where the metadata do not say


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    "default": _PreTokenizer(_gpt2),
    "gpt-2": _PreTokenizer(_gpt2),
    "gpt2": _PreTokenizer(_gpt2),
    "llama-bpe": _PreTokenizer(_llama3, ignore_merges=True, add_bos=True),
    "smollm": _PreTokenizer(_smollm),
}


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """The fields of ModelInfo that come from the tokenizer's metadata."""

    tokenizer_json: str
    vocab_size: int
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool
    special_token_ids: tuple[int, ...]


def read_tokenizer(metadata: Mapping[str, object], path: Path) -> TokenizerInfo:
    """Build the tokenizer that GGUF `metadata` describe.

    Raises FormatError (naming `path` and the key) for missing or contradictory metadata, UnsupportedModelError for a
    vocabulary or pre-tokenizer that is not implemented.
    """
    keys = _Keys(metadata, path)
    model = keys.text("model")
    if model != "gpt2":
        raise UnsupportedModelError(f"tokenizer.ggml.model must be gpt2 (byte-level BPE), found {model!r}.")
    pre_name = keys.text("pre", default="default")
    pre = _PRE_TOKENIZERS.get(pre_name)
    if pre is None:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise UnsupportedModelError(f"tokenizer.ggml.pre must be one of {known}, the checkpoint has {pre_name!r}.")
    if keys.flag("add_space_prefix", default=False):
        raise UnsupportedModelError("tokenizer.ggml.add_space_prefix is not supported for byte-level BPE.")

    tokens = keys.strings("tokens")
    types = keys.types(len(tokens))
    tokenizer = _build(tokens, keys.strings("merges"), types, pre, path)
    special = tuple(np.flatnonzero(types == TokenType.CONTROL).tolist())
    return TokenizerInfo(
        tokenizer_json=tokenizer.to_str(),
        vocab_size=len(tokens),
        chat_template=keys.template(),
        bos_token_id=keys.token_id("bos_token_id", len(tokens)),
        eos_token_ids=_end_tokens(keys, tokens, special),
        add_bos=keys.flag("add_bos_token", default=pre.add_bos),
        special_token_ids=special,
    )


def _build(
    tokens: Sequence[str], merges: Sequence[str], types: np.ndarray, pre: _PreTokenizer, path: Path
) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise FormatError(f"tokenizer.ggml.tokens: {twice!r} is given twice", path=path)
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(
                f"tokenizer.ggml.merges: {merge!r} must be two tokens whose concatenation is a token", path=path
            )
        pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()

    def added(kind: TokenType, *, special: bool) -> list[AddedToken]:
        chosen = [tokens[i] for i in np.flatnonzero(types == kind).tolist()]
        if "" in chosen:
            raise FormatError("tokenizer.ggml.tokens: a control or user-defined token is empty", path=path)
        return [AddedToken(token, special=special, normalized=False) for token in chosen]

    tokenizer.add_special_tokens(added(TokenType.CONTROL, special=True))
    tokenizer.add_tokens(added(TokenType.USER_DEFINED, special=False))
    assert tokenizer.get_vocab_size(with_added_tokens=True) == len(tokens)
    return tokenizer


def _end_tokens(keys: _Keys, tokens: Sequence[str], special: Sequence[int]) -> tuple[int, ...]:
    """Every token that ends a turn or the text: those that metadata name, then well-known control tokens."""
    named = [keys.token_id(key, len(tokens)) for key in _END_KEYS]
    known = [i for i in special if tokens[i] in END_NAMES]
    return tuple(dict.fromkeys(i for i in (*named, *known) if i is not None))


class _Keys:
    """Typed access to the `tokenizer.` keys of GGUF metadata."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        self._metadata = metadata
        self._path = path

    def text(self, key: str, default: str | None = None) -> str:
        value = self._metadata.get("tokenizer.ggml." + key, default)
        if not isinstance(value, str):
            raise self._error(key, "a string", value)
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._metadata.get("tokenizer.ggml." + key, default)
        if not isinstance(value, bool):
            raise self._error(key, "a bool", value)
        return value

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get("tokenizer.ggml." + key)
        if not isinstance(value, list):
            raise self._error(key, "an array of strings", value)
        return value

    def types(self, vocab_size: int) -> np.ndarray:
        """The kind of each token, int [vocab_size]; all NORMAL where the metadata do not say."""
        value = self._metadata.get("tokenizer.ggml.token_type")
        if value is None:
            return np.full(vocab_size, TokenType.NORMAL)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != vocab_size:
            raise self._error("token_type", f"an array of {vocab_size} integers", value)
        return value

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value = self._metadata.get("tokenizer.ggml." + key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise self._error(key, f"a token id below {vocab_size}", value)
        return value

    def template(self) -> str | None:
        value = self._metadata.get("tokenizer.chat_template")
        if value is not None and not isinstance(value, str):
            raise FormatError(f"tokenizer.chat_template must be a string, found {_shown(value)}", path=self._path)
        return value

    def _error(self, key: str, expected: str, value: object) -> FormatError:
        return FormatError(f"tokenizer.ggml.{key} must be {expected}, found {_shown(value)}", path=self._path)


def _shown(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {len(value)} {value.dtype}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    return "nothing" if value is None else repr(value)[:100]
