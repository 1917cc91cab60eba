"""A `tokenizers` tokenizer from GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

The tokenizer never adds BOS itself: `ModelInfo.add_bos` says whether plain text gets one. EOS is never appended to a
prompt, which is there to be continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models

from engine.errors import FormatError, UnsupportedModelError
from engine.weights.pre_tokenizers import PRE_TOKENIZERS
from engine.weights.sentencepiece import Vocabulary, build_tokenizer

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
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"tokenizer.ggml.model must be gpt2 (byte-level BPE) or llama (SentencePiece BPE), found {model!r}."
        )
    tokens = keys.strings("tokens")
    bos = keys.token_id("bos_token_id", len(tokens))
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(keys, tokens, path)
    else:
        tokenizer, add_bos = _sentencepiece(keys, tokens, path), bos is not None
    special = tuple(sorted(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special))
    return TokenizerInfo(
        tokenizer_json=tokenizer.to_str(),
        vocab_size=len(tokens),
        chat_template=keys.template(),
        bos_token_id=bos,
        eos_token_ids=_end_tokens(keys, tokens, special),
        add_bos=keys.flag("add_bos_token", default=add_bos),
        special_token_ids=special,
    )


def _byte_level(keys: _Keys, tokens: Sequence[str], path: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether its kind puts BOS before a text where the metadata do not say."""
    pre_name = keys.text("pre", default="default")
    pre = PRE_TOKENIZERS.get(pre_name)
    if pre is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModelError(f"tokenizer.ggml.pre must be one of {known}, the checkpoint has {pre_name!r}.")
    if keys.flag("add_space_prefix", default=False):
        raise UnsupportedModelError("tokenizer.ggml.add_space_prefix is not supported for byte-level BPE.")
    types = keys.types(len(tokens))
    if types is None:
        types = np.full(len(tokens), TokenType.NORMAL)
    types = _settled(tokens, types)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise FormatError(f"tokenizer.ggml.tokens: {twice!r} is given twice", path=path)
    pairs: list[tuple[str, str]] = []
    for merge in keys.strings("merges"):
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
    return tokenizer, pre.add_bos


def _sentencepiece(keys: _Keys, tokens: Sequence[str], path: Path) -> Tokenizer:
    """`tokenizer.ggml.pre` plays no part in it: a text is one piece before it is merged."""
    types = keys.types(len(tokens))
    if types is None:
        raise FormatError(
            f"tokenizer.ggml.token_type must be an array of {len(tokens)} integers, found nothing", path=path
        )
    if keys.has("precompiled_charsmap"):
        raise UnsupportedModelError("tokenizer.ggml.precompiled_charsmap is not supported for SentencePiece BPE.")
    vocabulary = Vocabulary(
        tokens=tokens,
        scores=keys.scores(len(tokens)),
        types=_settled(tokens, types),
        add_dummy_prefix=keys.flag("add_space_prefix", default=True),
        remove_extra_whitespaces=keys.flag("remove_extra_whitespaces", default=False),
        unknown_id=keys.token_id("unknown_token_id", len(tokens)),
    )
    return build_tokenizer(vocabulary, path, keys="tokenizer.ggml.")


def _settled(tokens: Sequence[str], types: np.ndarray) -> np.ndarray:
    """Token types in which a user-defined token written like a control token is one.

    Older converters marked `<|im_start|>` as user-defined where a tokenizer had added it, and a control token that is
    not known as one could be written by anybody's text.
    """
    settled = types.copy()
    for i in np.flatnonzero(types == TokenType.USER_DEFINED).tolist():
        if tokens[i] in END_NAMES or (tokens[i].startswith("<|") and tokens[i].endswith("|>")):
            settled[i] = TokenType.CONTROL
    return settled


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

    def has(self, key: str) -> bool:
        return "tokenizer.ggml." + key in self._metadata

    def types(self, vocab_size: int) -> np.ndarray | None:
        """The kind of each token, int [vocab_size]; None where the metadata do not say."""
        value = self._metadata.get("tokenizer.ggml.token_type")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != vocab_size:
            raise self._error("token_type", f"an array of {vocab_size} integers", value)
        return value

    def scores(self, vocab_size: int) -> np.ndarray:
        """The score of each token, float [vocab_size]."""
        value = self._metadata.get("tokenizer.ggml.scores")
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or len(value) != vocab_size:
            raise self._error("scores", f"an array of {vocab_size} floats", value)
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
