from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.errors import FormatError, UnsupportedModelError
from engine.weights.gguf import GgufFile
from engine.weights.gguf_tokenizer import TokenizerInfo, read_tokenizer
from tests.engine.weights.vocabularies import NAMES, gguf_metadata, golden
from tests.golden.texts import SENTENCEPIECE_TEXTS, SPECIAL_TEXTS, TEXTS
from tests.tiny_gguf import CHAT_TEMPLATE, VOCAB, TinyLlama

PATH = Path("model.gguf")


def metadata(**changes: object) -> dict[str, object]:
    """The tiny tokenizer's metadata as a file's reader gives them, with `changes` to tokenizer.ggml (None: removed)."""
    found = {key: value for key, value in TinyLlama().metadata.items() if key.startswith("tokenizer.")}
    found["tokenizer.ggml.token_type"] = np.array(found["tokenizer.ggml.token_type"], np.int32)
    found |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in found.items() if value is not None}


def tokens() -> list[str]:
    found = metadata()["tokenizer.ggml.tokens"]
    assert isinstance(found, list)
    return list(found)


def types(**kinds: TokenType) -> np.ndarray:
    """Token types where the named tokens have other kinds."""
    found = np.array(metadata()["tokenizer.ggml.token_type"])
    for token, kind in kinds.items():
        found[tokens().index(token)] = kind
    return found


def read(**changes: object) -> TokenizerInfo:
    return read_tokenizer(metadata(**changes), PATH)


def pieces(info: TokenizerInfo, text: str) -> list[str]:
    """What text is cut into before merging, as plain text."""
    pre = Tokenizer.from_str(info.tokenizer_json).pre_tokenizer
    assert pre is not None
    return [text[start:end] for _, (start, end) in pre.pre_tokenize_str(text)]


def test_fields() -> None:
    info = read()
    assert (info.vocab_size, info.bos_token_id, info.add_bos, info.chat_template) == (VOCAB, 1, False, CHAT_TEMPLATE)
    assert info.special_token_ids == (0, 1, 2)


def test_ids_are_the_checkpoint_s() -> None:
    tokenizer = Tokenizer.from_str(read().tokenizer_json)
    vocab = tokenizer.get_vocab()
    assert vocab == {token: i for i, token in enumerate(tokens())}
    ids = tokenizer.encode("<|im_start|>the hat<|im_end|>").ids
    assert [tokens()[i] for i in ids] == ["<|im_start|>", "th", "e", "Ġh", "at", "<|im_end|>"]


@given(st.text())
def test_any_text_survives(text: str) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


TOKENIZER = read().tokenizer_json


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["I", "'ll", " take", " ", "1", "2", "3", "4", "  ", " x", "!?\n"]),
        ("gpt-2", ["I", "'ll", " take", " 1234", "  ", " x", "!?", "\n"]),
        ("default", ["I", "'ll", " take", " 1234", "  ", " x", "!?", "\n"]),
        (None, ["I", "'ll", " take", " 1234", "  ", " x", "!?", "\n"]),
        ("llama-bpe", ["I", "'ll", " take", " ", "123", "4", "  ", " x", "!?\n"]),
    ],
)
def test_pre_tokenizers(pre: str | None, expected: list[str]) -> None:
    if pre == "smollm":
        expected = [*expected[:-1], "!?", "\n"]
    assert pieces(read(pre=pre), "I'll take 1234   x!?\n") == expected


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *((name, name) for name in ("gpt-2", "smollm", "llama-bpe", "tekken")),
        *((name, "llama-bpe") for name in ("llama3", "llama-v3", "falcon3", "smaug-bpe")),
        *((name, "gpt-2") for name in ("gpt2", "default")),
    ],
)
def test_pre_tokenizers_cut_as_the_published_patterns(name: str, pattern: str) -> None:
    pre = Tokenizer.from_str(read(pre=name).tokenizer_json).pre_tokenizer
    assert pre is not None
    for text, ends in zip(TEXTS, golden()["pre_tokenizers"][pattern], strict=True):
        assert [end for _, (_, end) in pre.pre_tokenize_str(text)] == ends, text


def test_what_goes_with_a_pre_tokenizer() -> None:
    names = ("gpt-2", "smollm", "llama-bpe", "llama3", "tekken", "smaug-bpe")
    found = {name: read(pre=name, add_bos_token=None) for name in names}
    ignoring = [json.loads(found[name].tokenizer_json)["model"]["ignore_merges"] for name in names]
    assert [found[name].add_bos for name in names] == ignoring == [False, False, True, True, True, False]


def test_llama_takes_whole_tokens_before_merging_and_adds_bos() -> None:
    # "hat" is a token that no merge reaches.
    changed = [*tokens()[:-1], "hat"]
    merges = [merge for merge in metadata()["tokenizer.ggml.merges"] if merge.replace(" ", "") in changed]  # type: ignore[attr-defined]
    kinds = {"tokens": changed, "merges": merges}
    assert Tokenizer.from_str(read(pre="llama-bpe", **kinds).tokenizer_json).encode("hat").tokens == ["hat"]
    assert Tokenizer.from_str(read(pre="gpt-2", **kinds).tokenizer_json).encode("hat").tokens == ["ha", "t"]
    assert read(pre="llama-bpe", add_bos_token=None).add_bos
    assert not read(pre="gpt-2", add_bos_token=None).add_bos


def test_user_defined_tokens_are_whole_but_not_special() -> None:
    changed = [*tokens()[:-1], "[tool call]"]
    kinds = types()
    kinds[-1] = TokenType.USER_DEFINED
    merges = [merge for merge in metadata()["tokenizer.ggml.merges"] if merge.replace(" ", "") in changed]  # type: ignore[attr-defined]
    info = read(tokens=changed, token_type=kinds, merges=merges)
    tokenizer = Tokenizer.from_str(info.tokenizer_json)
    encoded = tokenizer.encode("a[tool call]b")
    assert encoded.tokens == ["a", "[tool call]", "b"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "a[tool call]b"
    assert len(tokens()) - 1 not in info.special_token_ids


@pytest.mark.parametrize("token", ["<|im_start|>", "</s>", "<end_of_turn>"])
def test_user_defined_tokens_that_look_like_control_tokens_are(token: str) -> None:
    kinds = types()
    kinds[-1] = TokenType.USER_DEFINED
    found = metadata()
    merges = [merge for merge in found["tokenizer.ggml.merges"] if merge.replace(" ", "") in tokens()[:-1]]  # type: ignore[attr-defined]
    changed = [token if i == len(tokens()) - 1 else f"{t}~" if t == token else t for i, t in enumerate(tokens())]
    info = read(tokens=changed, token_type=kinds, merges=merges)
    assert len(tokens()) - 1 in info.special_token_ids


def test_end_tokens_are_all_that_the_checkpoint_names() -> None:
    # The keys first, then control tokens of well-known names; <|im_start|> and ordinary tokens are none.
    assert read().eos_token_ids == (2, 0)
    assert read(eos_token_id=0).eos_token_ids == (0, 2)
    assert read(eot_token_id=7, eom_token_id=8).eos_token_ids == (2, 7, 8, 0)
    kinds = types()
    kinds[0] = TokenType.NORMAL
    assert read(token_type=kinds, eos_token_id=None).eos_token_ids == (2,)


def test_end_tokens_of_llama_3() -> None:
    names = ("<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>")
    info = read(tokens=[*names, *tokens()[3:]], pre="llama-bpe", bos_token_id=0, eos_token_id=1, add_bos_token=None)
    assert (info.bos_token_id, info.add_bos, info.eos_token_ids) == (0, True, (1, 2))


def test_without_token_types_everything_is_ordinary() -> None:
    info = read(token_type=None)
    assert info.special_token_ids == ()
    assert info.eos_token_ids == (2,)


def test_no_template_no_bos() -> None:
    found = metadata(bos_token_id=None)
    del found["tokenizer.chat_template"]
    info = read_tokenizer(found, PATH)
    assert info.chat_template is None
    assert info.bos_token_id is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, r"model must be gpt2 \(byte-level BPE\) or llama \(SentencePiece BPE\), found 't5'"),
        ({"pre": "qwen9"}, "tokenizer.ggml.pre must be one of default, .* the checkpoint has 'qwen9'"),
        ({"add_space_prefix": True}, "add_space_prefix is not supported"),
    ],
)
def test_unsupported(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model must be a string, found nothing"),
        ({"pre": 3}, "tokenizer.ggml.pre must be a string, found 3"),
        ({"tokens": None}, "tokenizer.ggml.tokens must be an array of strings, found nothing"),
        ({"tokens": np.zeros(4)}, "tokens must be an array of strings, found an array of 4 float64"),
        ({"tokens": [*tokens()[:-1], "a"]}, "tokenizer.ggml.tokens: 'a' is given twice"),
        ({"tokens": ["", *tokens()[1:]]}, "a control or user-defined token is empty"),
        ({"merges": None}, "tokenizer.ggml.merges must be an array of strings, found nothing"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: 'ab' must be two tokens whose concatenation is a token"),
        ({"merges": ["q z"]}, "tokenizer.ggml.merges: 'q z' must be two tokens"),
        ({"merges": ["t nowhere"]}, "'t nowhere' must be two tokens"),
        ({"token_type": np.ones(5, np.int32)}, f"token_type must be an array of {VOCAB} integers, found an array of 5"),
        ({"token_type": ["x"] * VOCAB}, f"found an array of {VOCAB} strings"),
        ({"eos_token_id": VOCAB}, f"eos_token_id must be a token id below {VOCAB}, found {VOCAB}"),
        ({"bos_token_id": -1}, "bos_token_id must be a token id below"),
        ({"eot_token_id": "x"}, "eot_token_id must be a token id below"),
        ({"add_bos_token": 1}, "add_bos_token must be a bool, found 1"),
    ],
)
def test_malformed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(**changes)
    assert caught.value.path == PATH


def test_a_template_that_is_no_string() -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.chat_template must be a string, found 5"):
        read_tokenizer(metadata() | {"tokenizer.chat_template": 5}, PATH)


def sentencepiece(name: str = "llama", **changes: Any) -> TokenizerInfo:
    return read_tokenizer(gguf_metadata(name, **changes), PATH)


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_sentencepiece_s(name: str) -> None:
    info = sentencepiece(name)
    tokenizer = Tokenizer.from_str(info.tokenizer_json)
    tokenizer.encode_special_tokens = True
    texts = (*TEXTS, *SPECIAL_TEXTS, *SENTENCEPIECE_TEXTS)
    for text, ids in zip(texts, golden()["sentencepiece"][name]["texts"], strict=True):
        assert tokenizer.encode(text).ids == ids, text
    assert info.vocab_size == len(golden()["sentencepiece"][name]["pieces"])


def test_what_a_sentencepiece_vocabulary_is_where_nothing_is_said() -> None:
    info = sentencepiece(
        add_space_prefix=None, remove_extra_whitespaces=None, unknown_token_id=None, eos_token_id=None, pre="default"
    )
    assert (info.bos_token_id, info.add_bos, info.eos_token_ids) == (1, True, (2,))
    assert info.special_token_ids == (0, 1, 2, 3, 4)  # <unk>, <s>, </s> and what is trained as a control token
    assert Tokenizer.from_str(info.tokenizer_json).encode(" a").ids == sentencepiece_ids("  a")
    assert not sentencepiece(add_bos_token=False).add_bos
    assert not sentencepiece(bos_token_id=None).add_bos


def test_a_file_that_holds_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    checkpoint = TinyLlama(vocab=900)
    for key in [key for key in checkpoint.metadata if key.startswith("tokenizer.")]:
        del checkpoint.metadata[key]
    for key, value in gguf_metadata("llama").items():
        checkpoint.metadata[key] = value.tolist() if isinstance(value, np.ndarray) else value
    with GgufFile(checkpoint.write(tmp_path / "model.gguf")) as file:
        assert read_tokenizer(file.metadata, file.path) == sentencepiece()


def sentencepiece_ids(text: str) -> list[int]:
    """The ids of a text by a tokenizer that adds no space."""
    tokenizer = Tokenizer.from_str(sentencepiece(add_space_prefix=False).tokenizer_json)
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def test_user_defined_pieces_with_spaces() -> None:
    """Converters write their spaces either way."""
    for token in ("a\u2581b", "a b"):
        changed = list(gguf_metadata("user_defined")["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
        assert changed[5] == "a\u2581b"
        changed[5] = token
        tokenizer = Tokenizer.from_str(sentencepiece("user_defined", tokens=changed).tokenizer_json)
        assert tokenizer.encode("xa bx").ids.count(5) == 1
        assert tokenizer.decode(tokenizer.encode("xa bx").ids) == "xa bx"


def test_no_sentencepiece_normalization_but_identity() -> None:
    with pytest.raises(UnsupportedModelError, match="precompiled_charsmap is not supported"):
        sentencepiece(precompiled_charsmap=np.zeros(4, np.uint8))


def kinds(**changes: int) -> np.ndarray:
    """The types of the llama vocabulary with some changed: kinds(_3=6) makes piece 3 a BYTE."""
    found = np.array(gguf_metadata("llama")["tokenizer.ggml.token_type"])
    for key, kind in changes.items():
        found[int(key[1:])] = kind
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "scores must be an array of 900 floats, found nothing"),
        ({"scores": np.zeros(5, np.float32)}, "scores must be an array of 900 floats, found an array of 5 float32"),
        ({"scores": np.zeros(900, np.int32)}, "scores must be an array of 900 floats, found an array of 900 int32"),
        ({"scores": np.full(900, np.nan, np.float32)}, r"scores\[0\] must be a finite number, found nan"),
        ({"token_type": None}, "token_type must be an array of 900 integers, found nothing"),
        ({"token_type": kinds(_7=9)}, r"token_type\[7\] must be from 1 to 6, found 9"),
        ({"token_type": kinds(_7=2)}, r"token_type must have one UNKNOWN piece at most, found ids \[0, 7\]"),
        ({"token_type": kinds(_600=6)}, r"tokens\[600\]: a BYTE piece must be written <0x00> to <0xFF>, found"),
        ({"token_type": kinds(_7=1)}, "token_type must have 256 BYTE pieces or none, found 255"),
        ({"unknown_token_id": 9}, "unknown_token_id must be the UNKNOWN piece 0 of .*token_type, found 9"),
        ({"unknown_token_id": 900}, "unknown_token_id must be a token id below 900, found 900"),
        ({"add_space_prefix": 1}, "add_space_prefix must be a bool, found 1"),
        ({"remove_extra_whitespaces": "x"}, "remove_extra_whitespaces must be a bool, found 'x'"),
        ({"tokens": ["a"] * 900}, "tokens: 'a' is given twice"),
    ],
)
def test_contradictions_of_a_sentencepiece_vocabulary(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match="^model.gguf: tokenizer.ggml." + message) as caught:
        sentencepiece(**changes)
    assert caught.value.path == PATH
