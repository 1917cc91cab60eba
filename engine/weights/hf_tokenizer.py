"""The tokenizer of a Hugging Face folder: tokenizer.json, and what the configurations beside it say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine.errors import FormatError
from engine.weights.gguf_tokenizer import END_NAMES, TokenizerInfo

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer.json in the field is about 35 MB."""


def read_tokenizer_folder(folder: Path) -> TokenizerInfo:
    """Read tokenizer.json, and where they exist tokenizer_config.json, generation_config.json, config.json and the
    chat template.

    Tokens that end a turn are every one that a configuration names as EOS, then the well-known ones among the special
    tokens. Raises FormatError naming the file.
    """
    path = folder / "tokenizer.json"
    source = _read(path)
    if source is None:
        raise FormatError("the file is missing", path=path)
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(str(error), path=path) from None
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    special = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    tokenizer_config = _Config(folder / "tokenizer_config.json")
    configs = [_Config(folder / "generation_config.json"), _Config(folder / "config.json")]

    bos = tokenizer_config.token("bos_token", tokens)
    ends = [tokenizer_config.token("eos_token", tokens)]
    for config in configs:
        if bos is None:
            bos = next(iter(config.ids("bos_token_id", tokens)), None)
        ends += config.ids("eos_token_id", tokens)
    ends += [token_id for token, token_id in special.items() if token in END_NAMES]
    return TokenizerInfo(
        tokenizer_json=source,
        vocab_size=1 + max(tokens.values(), default=-1),
        chat_template=_chat_template(folder, tokenizer_config),
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=_adds_bos(tokenizer, tokenizer_config, bos),
        special_token_ids=tuple(sorted(special.values())),
    )


def _adds_bos(tokenizer: Tokenizer, config: _Config, bos: int | None) -> bool:
    """The configuration's word, else what the tokenizer's post-processor does to an empty text."""
    named = config.values.get("add_bos_token")
    if named is None:
        return bos is not None and tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos]
    if not isinstance(named, bool):
        raise FormatError(f"add_bos_token must be a bool, found {named!r}", path=config.path)
    return named and bos is not None


def _chat_template(folder: Path, config: _Config) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's template, the one named "default" where there are several."""
    path = folder / "chat_template.jinja"
    source = _read(path)
    if source is not None:
        return source
    value = config.values.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise FormatError(f"chat_template must be a string, found {type(value).__name__}", path=config.path)
    return value


class _Config:
    """A JSON object in a file; empty where there is no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: Mapping[str, Any] = {}
        source = _read(path)
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


def _read(path: Path) -> str | None:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise FormatError(f"at most {MAX_FILE_BYTES} bytes are read, the file has {size}", path=path)
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(str(error), path=path) from None
