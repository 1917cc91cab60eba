"""Reading `tokenizer.model`: the SentencePiece vocabulary in original Llama 2 and Mistral releases.

The file is one protobuf message of which a dozen fields matter here. They are read directly: each length is checked
against its message before a byte of it is used, every error names its byte, and neither a protobuf runtime nor
SentencePiece's own parser, both made for files one trusts, is a dependency for it.

Source: sentencepiece_model.proto; the Protocol Buffers encoding.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import TokenType

from engine.errors import FormatError, UnsupportedModelError
from engine.weights.sentencepiece import Vocabulary

MAX_FILE_BYTES = 64 << 20
"""The largest in the field, of 256,000 pieces, has 5 MB."""
MAX_PIECES = 1 << 20

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


class _Wire(enum.IntEnum):
    VARINT = 0
    FIXED64 = 1
    BYTES = 2
    FIXED32 = 5


_MODEL: Mapping[int, tuple[str, _Wire]] = {
    1: ("pieces", _Wire.BYTES),
    2: ("trainer_spec", _Wire.BYTES),
    3: ("normalizer_spec", _Wire.BYTES),
    5: ("denormalizer_spec", _Wire.BYTES),
}
_PIECE: Mapping[int, tuple[str, _Wire]] = {
    1: ("piece", _Wire.BYTES),
    2: ("score", _Wire.FIXED32),
    3: ("type", _Wire.VARINT),
}
_TRAINER: Mapping[int, tuple[str, _Wire]] = {
    3: ("model_type", _Wire.VARINT),
    24: ("treat_whitespace_as_suffix", _Wire.VARINT),
    35: ("byte_fallback", _Wire.VARINT),
    46: ("bos_piece", _Wire.BYTES),
    47: ("eos_piece", _Wire.BYTES),
}
_NORMALIZER: Mapping[int, tuple[str, _Wire]] = {
    2: ("precompiled_charsmap", _Wire.BYTES),
    3: ("add_dummy_prefix", _Wire.VARINT),
    4: ("remove_extra_whitespaces", _Wire.VARINT),
    5: ("escape_whitespaces", _Wire.VARINT),
}


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a SentencePiece BPE file holds."""

    vocabulary: Vocabulary
    bos_token_id: int | None
    eos_token_id: int | None


def read_model(data: bytes, path: Path, *, max_pieces: int = MAX_PIECES) -> SentencePieceModel:
    """Read the bytes of a `tokenizer.model` of up to `max_pieces` pieces.

    Raises FormatError with the offset where the file is malformed, UnsupportedModelError for what is no SentencePiece
    BPE model, or one that changes characters before it cuts a text into pieces.
    """
    if _TIKTOKEN.match(data):
        raise UnsupportedModelError(
            f"{path}: expected a SentencePiece model, found a tiktoken vocabulary (as in original Llama 3 releases): "
            "use a release with tokenizer.json."
        )
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer = _Spec(model_type=1, treat_whitespace_as_suffix=0, byte_fallback=0, bos_piece=b"<s>", eos_piece=b"</s>")
    normalizer = _Spec(precompiled_charsmap=b"", add_dummy_prefix=1, remove_extra_whitespaces=1, escape_whitespaces=1)
    denormalizer = _Spec(precompiled_charsmap=b"")
    for name, body in _Message(data, 0, len(data), path, "the model").fields(_MODEL):
        assert isinstance(body, _Message)
        match name:
            case "pieces":
                token, score, kind = _read_piece(body, len(tokens))
                tokens.append(token)
                scores.append(score)
                types.append(kind)
                if len(tokens) > max_pieces:
                    raise FormatError(f"at most {max_pieces} pieces are read", path=path, offset=body.start)
            case "trainer_spec":
                trainer.read(body, _TRAINER)
            case "normalizer_spec":
                normalizer.read(body, _NORMALIZER)
            case "denormalizer_spec":
                denormalizer.read(body, _NORMALIZER)

    model_type = trainer.number("model_type")
    if not tokens:
        raise FormatError("expected a SentencePiece model, found no pieces", path=path)
    if model_type != 2:
        found = _MODEL_TYPES.get(model_type, str(model_type))
        raise UnsupportedModelError(f"{path}: trainer_spec.model_type must be bpe, found {found}.")
    _need_plain(trainer, normalizer, denormalizer, path)
    has_bytes = TokenType.BYTE in types
    if has_bytes != bool(trainer.number("byte_fallback")):
        raise FormatError(
            f"trainer_spec.byte_fallback is {bool(trainer.number('byte_fallback'))}, "
            f"but there are {types.count(TokenType.BYTE)} BYTE pieces",
            path=path,
        )
    controls = {tokens[i]: i for i, kind in enumerate(types) if kind == TokenType.CONTROL}
    return SentencePieceModel(
        vocabulary=Vocabulary(
            tokens=tokens,
            scores=np.array(scores, np.float32),
            types=np.array(types, np.int64),
            add_dummy_prefix=bool(normalizer.number("add_dummy_prefix")),
            remove_extra_whitespaces=bool(normalizer.number("remove_extra_whitespaces")),
        ),
        bos_token_id=controls.get(trainer.text("bos_piece")),
        eos_token_id=controls.get(trainer.text("eos_piece")),
    )


def _need_plain(trainer: _Spec, normalizer: _Spec, denormalizer: _Spec, path: Path) -> None:
    """Refuse what would change a text on its way to pieces or back."""
    unsupported = {
        "trainer_spec.treat_whitespace_as_suffix": trainer.number("treat_whitespace_as_suffix"),
        "normalizer_spec.precompiled_charsmap (a normalization other than identity)": normalizer.size(
            "precompiled_charsmap"
        ),
        "normalizer_spec.escape_whitespaces = false": not normalizer.number("escape_whitespaces"),
        "denormalizer_spec.precompiled_charsmap": denormalizer.size("precompiled_charsmap"),
    }
    for name, found in unsupported.items():
        if found:
            raise UnsupportedModelError(f"{path}: {name} is not supported.")


def _read_piece(body: _Message, token_id: int) -> tuple[str, float, int]:
    token, score, kind = "", 0.0, int(TokenType.NORMAL)
    for name, value in body.fields(_PIECE):
        if isinstance(value, _Message):
            token = value.text(f"pieces[{token_id}].piece")
        elif isinstance(value, float):
            score = value
        else:
            assert name == "type"
            kind = value
            if not TokenType.NORMAL <= kind <= TokenType.BYTE:
                raise FormatError(
                    f"pieces[{token_id}].type must be from 1 to 6, found {kind}", path=body.path, offset=body.start
                )
    if not token:
        raise FormatError(f"pieces[{token_id}].piece must not be empty", path=body.path, offset=body.start)
    return token, score, kind


class _Spec:
    """Fields of a message by name; what the file does not give keeps its default."""

    def __init__(self, **defaults: int | bytes) -> None:
        self._values: dict[str, int | bytes | _Message] = {**defaults}

    def read(self, body: _Message, schema: Mapping[int, tuple[str, _Wire]]) -> None:
        for name, value in body.fields(schema):
            if name in self._values:
                assert not isinstance(value, float)
                self._values[name] = value

    def number(self, name: str) -> int:
        value = self._values[name]
        assert isinstance(value, int)
        return value

    def size(self, name: str) -> int:
        """The length of a field of bytes."""
        value = self._values[name]
        return value.end - value.start if isinstance(value, _Message) else len(self._bytes(name))

    def text(self, name: str) -> str:
        value = self._values[name]
        return value.text(name) if isinstance(value, _Message) else self._bytes(name).decode()

    def _bytes(self, name: str) -> bytes:
        value = self._values[name]
        assert isinstance(value, bytes)
        return value


@dataclass(frozen=True, slots=True)
class _Message:
    """A stretch of the file, data[start:end]: a message, a string or bytes."""

    data: bytes
    start: int
    end: int
    path: Path
    name: str

    def text(self, name: str) -> str:
        try:
            return self.data[self.start : self.end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{name}: invalid UTF-8", self.start + error.start) from None

    def fields(self, schema: Mapping[int, tuple[str, _Wire]]) -> Iterator[tuple[str, int | float | _Message]]:
        """The fields that `schema` names, in the order of the file; others are skipped."""
        at = self.start
        while at < self.end:
            begin = at
            tag, at = self._varint(at)
            number, wire = tag >> 3, tag & 7
            name, expected = schema.get(number, (f"field {number}", None))
            if number == 0 or wire not in set(_Wire) or (expected is not None and wire != expected):
                wanted = "a field" if expected is None else f"wire type {int(expected)}"
                raise self._error(f"{self.name}: {name} must be {wanted}, found wire type {wire}", begin)
            value: int | float | _Message
            if wire == _Wire.VARINT:
                value, at = self._varint(at)
            else:
                size = 8 if wire == _Wire.FIXED64 else 4
                if wire == _Wire.BYTES:
                    size, at = self._varint(at)
                if size > self.end - at:
                    raise self._error(f"{self.name}: {name} needs {size} bytes, only {self.end - at} are left", begin)
                if wire == _Wire.FIXED32:
                    value = float(struct.unpack_from("<f", self.data, at)[0])
                else:
                    value = _Message(self.data, at, at + size, self.path, name)
                at += size
            if expected is not None:
                yield name, value

    def _varint(self, at: int) -> tuple[int, int]:
        """An unsigned integer of up to 64 bits, and where it ends."""
        value = 0
        for i in range(10):
            if at + i >= self.end:
                raise self._error(f"{self.name}: a number is cut short", at)
            byte = self.data[at + i]
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80 and value < 1 << 64:
                return value, at + i + 1
        raise self._error(f"{self.name}: a number has more than 64 bits", at)

    def _error(self, message: str, offset: int) -> FormatError:
        return FormatError(message, path=self.path, offset=offset)
