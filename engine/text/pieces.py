"""What each token contributes to text, as bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from tokenizers.pre_tokenizers import ByteLevel

from engine.errors import FormatError, UnsupportedModelError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pieces:
    """The bytes that token ids are joined from. Text is their concatenation, so it can be made token by token."""

    of_token: tuple[bytes, ...]  # [vocab_size]
    strip_first_space: bool  # a text's first space was put there by the tokenizer


class _Saved(msgspec.Struct):
    """What is read here of a serialized tokenizer."""

    decoder: dict[str, Any] | None = None


def token_pieces(tokenizer_json: str, tokens: Sequence[str]) -> Pieces:
    """The bytes of every token, as the tokenizer's decoder takes them.

    Two kinds of decoder are known. Byte-level BPE: a token whose characters all stand for bytes gives those bytes, any
    other (an added token with, say, a Greek letter) its own text. SentencePiece: a token gives its text with spaces for
    U+2581, and "<0xNN>", where the decoder has byte fallback, that byte.

    Raises UnsupportedModelError for other decoders: in them a token's text may depend on its neighbours. Raises
    FormatError where `tokenizer_json` is not JSON.
    """
    try:
        decoder = msgspec.json.decode(tokenizer_json, type=_Saved).decoder or {}
    except msgspec.MsgspecError as error:  # the tokenizers library reads some things that are not JSON
        raise FormatError(f"tokenizer: {error}") from None
    steps = decoder.get("decoders", ()) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type", "none") for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(_byte_level(tokens), False)
    if kinds == ["Metaspace"] and steps[0].get("replacement") == _SPACE:
        return Pieces(_sentencepiece(tokens, byte_fallback=False), steps[0].get("prepend_scheme") != "never")
    if steps[:1] == [_REPLACE] and [kind for kind in kinds[1:] if kind not in _OPTIONAL] == []:
        # Without Fuse, Strip would take the first space of every token.
        strips = [step for step in steps if step["type"] == "Strip"]
        if not strips or (strips == [_STRIP] and kinds[-2:] == ["Fuse", "Strip"]):
            return Pieces(_sentencepiece(tokens, byte_fallback="ByteFallback" in kinds), bool(strips))
    raise UnsupportedModelError(
        f"The tokenizer's decoder must be ByteLevel or that of SentencePiece, the checkpoint has {' + '.join(kinds)!r}."
    )


_SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_OPTIONAL = ("ByteFallback", "Fuse", "Strip")


def _sentencepiece(tokens: Sequence[str], *, byte_fallback: bool) -> tuple[bytes, ...]:
    def piece(token: str) -> bytes:
        match = _BYTE.fullmatch(token) if byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()

    return tuple(map(piece, tokens))


def _byte_level(tokens: Sequence[str]) -> tuple[bytes, ...]:
    byte_of = _bytes_of_characters()
    pieces = []
    for token in tokens:
        try:
            pieces.append(token.translate(byte_of).encode("latin-1"))
        except UnicodeEncodeError:
            pieces.append(token.encode())
    return tuple(pieces)


def _bytes_of_characters() -> dict[int, int]:
    """GPT-2's alphabet, as str.translate takes it: code point -> byte.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 onward, in order. What stands for no byte but
    could be written as one is led out of Latin-1.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {byte: byte for byte in printable} | {0x100 + i: byte for i, byte in enumerate(others)}
    assert set(map(chr, byte_of)) == set(ByteLevel.alphabet())
    return byte_of | dict.fromkeys(others, 0x100)
