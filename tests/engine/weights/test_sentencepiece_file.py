from __future__ import annotations

import struct
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import FormatError, ModelError, UnsupportedModelError
from engine.weights.sentencepiece_file import read_model
from tests.engine.weights.vocabularies import NAMES, golden, model, model_path

PATH = Path("tokenizer.model")


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message: a varint, a float or bytes."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str, kind: int = TokenType.NORMAL, score: float = 0.0) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


UNK, A = piece("<unk>", TokenType.UNKNOWN), piece("a")
BPE = field(2, field(3, 2))


@pytest.mark.parametrize("name", NAMES)
def test_what_sentencepiece_wrote(name: str) -> None:
    found = model(name)
    tokens, scores = zip(*golden()["sentencepiece"][name]["pieces"], strict=True)
    assert tuple(found.vocabulary.tokens) == tokens
    assert np.array_equal(found.vocabulary.scores, np.array(scores, np.float32))
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)


def test_kinds_and_flags() -> None:
    counts = {name: Counter(map(TokenType, model(name).vocabulary.types.tolist())) for name in NAMES}
    assert [counts[name][TokenType.BYTE] for name in NAMES] == [256, 0, 256]
    assert [counts[name][TokenType.CONTROL] for name in NAMES] == [4, 2, 2]
    assert [counts[name][TokenType.USER_DEFINED] for name in NAMES] == [0, 0, 3]
    assert [counts[name][TokenType.UNKNOWN] for name in NAMES] == [1, 1, 1]
    assert [model(name).vocabulary.add_dummy_prefix for name in NAMES] == [True, True, False]
    assert [model(name).vocabulary.remove_extra_whitespaces for name in NAMES] == [False, True, False]


def test_defaults_unknown_fields_and_the_last_value() -> None:
    extra = field(9, 2**64 - 1) + field(10, b"x") + field(11, 1.0) + varint(12 << 3 | 1) + bytes(8)
    bare = field(1, field(1, b"b") + extra)
    found = read_model(extra + UNK + bare + BPE + field(2, field(3, 1) + field(3, 2) + extra), PATH)
    assert found.vocabulary.tokens == ["<unk>", "b"]
    assert (found.vocabulary.scores[1], found.vocabulary.types[1]) == (0, TokenType.NORMAL)
    assert (found.vocabulary.add_dummy_prefix, found.vocabulary.remove_extra_whitespaces) == (True, True)
    assert (found.bos_token_id, found.eos_token_id) == (None, None)


def test_bos_and_eos_are_control_pieces_of_the_names_in_the_file() -> None:
    named = field(2, field(3, 2) + field(46, b"[B]") + field(47, b"a"))
    found = read_model(UNK + A + piece("[B]", TokenType.CONTROL) + named, PATH)
    assert (found.bos_token_id, found.eos_token_id) == (2, None)  # "a" is no control piece


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (UNK + A, "trainer_spec.model_type must be bpe, found unigram"),
        (UNK + A + field(2, field(3, 3)), "must be bpe, found word"),
        (UNK + A + field(2, field(3, 9)), "must be bpe, found 9"),
        (UNK + A + BPE + field(3, field(2, b"x")), "a normalization other than identity.* is not supported"),
        (UNK + A + BPE + field(3, field(5, 0)), "escape_whitespaces = false is not supported"),
        (UNK + A + BPE + field(5, field(2, b"x")), "denormalizer_spec.precompiled_charsmap is not supported"),
        (UNK + A + field(2, field(3, 2) + field(24, 1)), "treat_whitespace_as_suffix is not supported"),
        (b"IQ== 0\nIg== 1\n", "expected a SentencePiece model, found a tiktoken vocabulary"),
    ],
)
def test_unsupported(data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"^{PATH}: .*{message}"):
        read_model(data, PATH)


@pytest.mark.parametrize(
    ("data", "offset", "message"),
    [
        (b"", None, "found no pieces"),
        (BPE, None, "found no pieces"),
        (UNK + b"\x0a\x05ab", len(UNK), "pieces needs 5 bytes, only 2 are left"),
        (UNK + b"\x0a\xff\xff\xff\xff\x0f", len(UNK), "pieces needs 4294967295 bytes, only 0 are left"),
        (UNK + b"\x80", len(UNK), "a number is cut short"),
        (UNK + b"\xff" * 10 + b"\x01", len(UNK), "a number has more than 64 bits"),
        (b"\x08\x01", 0, "pieces must be wire type 2, found wire type 0"),
        (b"\x0b", 0, "pieces must be wire type 2, found wire type 3"),
        (b"\x33", 0, "field 6 must be a field, found wire type 3"),
        (b"\x00\x00", 0, "field 0 must be a field"),
        (field(1, field(1, 5)), 2, "pieces: piece must be wire type 2, found wire type 0"),
        (field(1, field(2, 5)), 2, "pieces: score must be wire type 5"),
        (field(1, field(1, b"a\xff")), 5, r"pieces\[0\]\.piece: invalid UTF-8"),
        (field(1, field(2, 1.0)), 2, r"pieces\[0\]\.piece must not be empty"),
        (field(1, field(1, b"a") + field(3, 7)), 2, r"pieces\[0\]\.type must be from 1 to 6, found 7"),
        (UNK + A + field(2, field(3, 2) + field(35, 1)), None, "byte_fallback is True, but there are 0 BYTE pieces"),
        (UNK + piece("<0x00>", TokenType.BYTE) + BPE, None, "byte_fallback is False, but there are 1 BYTE pieces"),
        (UNK + A + field(2, field(3, 2) + field(46, b"\xff")), len(UNK + A) + 7, "bos_piece: invalid UTF-8"),
    ],
)
def test_malformed(data: bytes, offset: int | None, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_model(data, PATH)
    assert (caught.value.path, caught.value.offset) == (PATH, offset)


def test_more_pieces_than_any_model_has() -> None:
    assert len(read_model(UNK + A + BPE, PATH, max_pieces=2).vocabulary.tokens) == 2
    with pytest.raises(FormatError, match="at most 2 pieces are read"):
        read_model(UNK + A + A + BPE, PATH, max_pieces=2)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_fail_cleanly(data: bytes) -> None:
    with suppress(ModelError):
        read_model(data, PATH)


@given(st.data())
def test_damaged_files_fail_cleanly_or_read(data: st.DataObject) -> None:
    whole = bytearray(model_path("defaults").read_bytes()[-1200:])
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=5)):
        whole[at] = data.draw(st.integers(0, 255))
    with suppress(ModelError):
        read_model(bytes(whole), PATH)


def test_a_file_cut_short_anywhere_fails_cleanly() -> None:
    whole = UNK + A + piece("<s>", TokenType.CONTROL) + BPE
    read_model(whole, PATH)
    for end in range(len(whole)):
        with pytest.raises(ModelError):
            read_model(whole[:end], PATH)
