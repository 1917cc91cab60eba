"""What each token contributes to text, as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from tokenizers.pre_tokenizers import ByteLevel

from engine.errors import UnsupportedModelError


class _Saved(msgspec.Struct):
    """What is read here of a serialized tokenizer."""

    decoder: dict[str, Any] | None = None


def byte_level_pieces(tokenizer_json: str, tokens: Sequence[str]) -> tuple[bytes, ...]:
    """The bytes of byte-level BPE tokens, as the library's ByteLevel decoder takes them.

    A token whose characters all stand for bytes gives those bytes; any other (an added token with, say, a Greek letter)
    gives its own text. Text is the concatenation of bytes, so it can be made token by token. Raises
    UnsupportedModelError for other decoders: in them a token's text may depend on its neighbours.
    """
    decoder = msgspec.json.decode(tokenizer_json, type=_Saved).decoder or {}
    if decoder.get("type") == "Sequence" and len(decoder.get("decoders", ())) == 1:
        decoder = decoder["decoders"][0]
    if decoder.get("type") != "ByteLevel":
        raise UnsupportedModelError(
            f"The tokenizer's decoder must be ByteLevel, the checkpoint has {decoder.get('type', 'none')!r}."
        )
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
