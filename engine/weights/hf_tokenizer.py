"""The tokenizer of a Hugging Face folder: tokenizer.json or tokenizer.model, and what the configurations beside it say.

A folder that has both is read by its tokenizer.json. Only where there is none, as in original Llama 2 and Mistral
releases, the SentencePiece model is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType
from tokenizers import Tokenizer

from engine.errors import FormatError, UnsupportedModelError
from engine.weights import sentencepiece_file
from engine.weights.gguf_tokenizer import END_NAMES, TokenizerInfo
from engine.weights.sentencepiece import Vocabulary, build_tokenizer

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer.json in the field is about 35 MB."""
MAX_VOCAB_SIZE = 1 << 22
"""Token ids are below it; the largest vocabulary in the field has about 260,000. Tables of a vocabulary's length are
made from an id that a file names."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A tokenizer, and what its own file says of BOS and EOS."""

    tokenizer: Tokenizer
    source: str  # serialized
    bos: int | None = None
    eos: int | None = None


def read_tokenizer_folder(folder: Path) -> TokenizerInfo:
    """Read tokenizer.json or tokenizer.model, and where they exist tokenizer_config.json, generation_config.json,
    config.json, added_tokens.json (beside tokenizer.model) and the chat template.

    Tokens that end a turn are every one that a configuration names as EOS, then the well-known ones among the special
    tokens. Raises FormatError naming the file, UnsupportedModelError for a tokenizer.model that is not implemented.
    """
    tokenizer_config = _Config(folder / "tokenizer_config.json")
    found = _tokenizer_json(folder) or _tokenizer_model(folder, tokenizer_config)
    if found is None:
        raise FormatError("the file is missing, and there is no tokenizer.model", path=folder / "tokenizer.json")
    tokens = found.tokenizer.get_vocab(with_added_tokens=True)
    largest = max(tokens.values(), default=-1)
    if largest >= MAX_VOCAB_SIZE:
        raise FormatError(f"token ids must be below {MAX_VOCAB_SIZE}, found {largest}", path=folder / "tokenizer.json")
    special = {
        token.content: token_id
        for token_id, token in found.tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    configs = [_Config(folder / "generation_config.json"), _Config(folder / "config.json")]

    bos = tokenizer_config.token("bos_token", tokens)
    ends = [tokenizer_config.token("eos_token", tokens)]
    for config in configs:
        if bos is None:
            bos = next(iter(config.ids("bos_token_id", tokens)), None)
        ends += config.ids("eos_token_id", tokens)
    ends += [found.eos, *(token_id for token, token_id in special.items() if token in END_NAMES)]
    bos = found.bos if bos is None else bos
    return TokenizerInfo(
        tokenizer_json=found.source,
        vocab_size=1 + largest,
        chat_template=_chat_template(folder, tokenizer_config),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=_adds_bos(found, tokenizer_config, bos, folder),
        special_token_ids=tuple(sorted(special.values())),
    )


def _tokenizer_json(folder: Path) -> _Found | None:
    path = folder / "tokenizer.json"
    source = _read_text(path)
    if source is None:
        return None
    try:
        return _Found(parse_tokenizer(source), source)
    except ValueError as error:
        raise FormatError(str(error), path=path) from None


def parse_tokenizer(source: str) -> Tokenizer:
    """A serialized tokenizer. Raises ValueError where it is none.

    The library raises bare Exceptions, and on some sources its Rust panics, which reaches Python as an exception that
    is derived from BaseException and has no importable name.
    """
    try:
        return Tokenizer.from_str(source)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from None
        raise


def _tokenizer_model(folder: Path, config: _Config) -> _Found | None:
    """The SentencePiece model with the tokens that the configurations add to it."""
    path = folder / "tokenizer.model"
    data = _read(path, sentencepiece_file.MAX_FILE_BYTES)
    if data is None:
        return None
    model = sentencepiece_file.read_model(data, path)
    vocabulary = _with_added_tokens(model.vocabulary, config, _Config(folder / "added_tokens.json"))
    tokenizer = build_tokenizer(vocabulary, path)
    return _Found(tokenizer, tokenizer.to_str(), model.bos_token_id, model.eos_token_id)


def _with_added_tokens(vocabulary: Vocabulary, config: _Config, added: _Config) -> Vocabulary:
    """`vocabulary` with added_tokens.json ({text: id}), then tokenizer_config.json's added_tokens_decoder
    ({id: {"content": text, "special": bool}}). Ids go on where the vocabulary ends."""
    tokens, types = list(vocabulary.tokens), vocabulary.types.tolist()

    def add(token_id: object, text: object, special: object, file: _Config) -> None:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id <= len(tokens):
            raise FormatError(
                f"an added token's id must be at most {len(tokens)}, found {token_id!r} for {text!r}", path=file.path
            )
        if not isinstance(text, str) or not text or not isinstance(special, bool):
            raise FormatError(f"added token {token_id} must have a text and be special or not", path=file.path)
        if token_id == len(tokens):
            tokens.append(text)
            types.append(TokenType.USER_DEFINED)
        elif tokens[token_id] != text:
            raise FormatError(
                f"added token {token_id} must be {tokens[token_id]!r}, as in the vocabulary, found {text!r}",
                path=file.path,
            )
        if special and types[token_id] != TokenType.UNKNOWN:
            types[token_id] = TokenType.CONTROL

    def by_id(item: tuple[object, object]) -> int:
        return item[0] if isinstance(item[0], int) else -1

    for token_id, text in sorted(((value, key) for key, value in added.values.items()), key=by_id):
        add(token_id, text, False, added)
    decoder = config.values.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(isinstance(entry, dict) for entry in decoder.values()):
        raise FormatError("added_tokens_decoder must be an object of objects", path=config.path)
    entries = [(int(key) if key.isdecimal() else key, entry) for key, entry in decoder.items()]
    for token_id, entry in sorted(entries, key=by_id):
        if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
            raise UnsupportedModelError(
                f"{config.path}: added token {token_id} takes spaces or words beside it along, which is supported with "
                "a tokenizer.json only."
            )
        add(token_id, entry.get("content"), entry.get("special", False), config)
    return Vocabulary(
        tokens=tokens,
        scores=np.pad(vocabulary.scores, (0, len(tokens) - len(vocabulary.scores))),
        types=np.array(types, np.int64),
        add_dummy_prefix=vocabulary.add_dummy_prefix,
        remove_extra_whitespaces=vocabulary.remove_extra_whitespaces,
    )


def _adds_bos(found: _Found, config: _Config, bos: int | None, folder: Path) -> bool:
    """The configuration's word, else what the tokenizer does: a post-processor with an empty text, a SentencePiece
    model (as in Hugging Face's Llama tokenizer) always."""
    named = config.values.get("add_bos_token")
    if named is not None and not isinstance(named, bool):
        raise FormatError(f"add_bos_token must be a bool, found {named!r}", path=config.path)
    if bos is None or named is not None:
        return bool(named) and bos is not None
    if found.bos is not None:
        return True
    try:
        return found.tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos]
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"the tokenizer cannot encode: {error}", path=folder / "tokenizer.json") from None


def _chat_template(folder: Path, config: _Config) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's template, the one named "default" where there are several."""
    path = folder / "chat_template.jinja"
    source = _read_text(path)
    if source is not None:
        return source
    value = config.values.get("chat_template")
    if isinstance(value, list):
        defaults = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = defaults[-1].get("template") if defaults else None
    if value is not None and not isinstance(value, str):
        raise FormatError(f"chat_template must be a string, found {type(value).__name__}", path=config.path)
    return value


class _Config:
    """A JSON object in a file; empty where there is no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: Mapping[str, Any] = {}
        source = _read_text(path)
        if source is not None:
            try:
                values = json.loads(source)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"not JSON: {error}", path=path) from None
            if not isinstance(values, dict):
                raise FormatError(f"must be a JSON object, found {type(values).__name__}", path=path)
            self.values = values

    def token(self, key: str, tokens: Mapping[str, int]) -> int | None:
        """The id of a token given by its text, or as an added token's {"content": text}."""
        value = self.values.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            return None
        if not isinstance(text, str) or text not in tokens:
            raise FormatError(f"{key} must be a token of the vocabulary, found {text!r}", path=self.path)
        return tokens[text]

    def ids(self, key: str, tokens: Mapping[str, int]) -> list[int]:
        """Token ids given as one number or a list of them."""
        value = self.values.get(key)
        found = value if isinstance(value, list) else [] if value is None else [value]
        known = set(tokens.values())
        for token_id in found:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id not in known:
                raise FormatError(f"{key} must hold ids of the vocabulary, found {token_id!r}", path=self.path)
        return found


def _read_text(path: Path) -> str | None:
    data = _read(path, MAX_FILE_BYTES)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(str(error), path=path) from None


def _read(path: Path, limit: int) -> bytes | None:
    """The bytes of a file; None where there is none."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise FormatError("it is not a file", path=path)
        with path.open("rb") as file:
            # A buffer as large as the limit would be allocated for a file of any size.
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatError(str(error), path=path) from None
    if len(data) > limit:
        raise FormatError(f"at most {limit} bytes are read, the file has {path.stat().st_size}", path=path)
    return data
