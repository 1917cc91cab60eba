from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.errors import FormatError, UnsupportedModelError
from engine.weights.gguf_tokenizer import TokenizerInfo, read_tokenizer
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


def test_end_tokens_are_all_that_the_checkpoint_names() -> None:
    # The keys first, then control tokens of well-known names; <|im_start|> and ordinary tokens are none.
    assert read().eos_token_ids == (2, 0)
    assert read(eos_token_id=0).eos_token_ids == (0, 2)
    assert read(eot_token_id=7, eom_token_id=8).eos_token_ids == (2, 7, 8, 0)
    kinds = types()
    kinds[0] = TokenType.NORMAL
    assert read(token_type=kinds, eos_token_id=None).eos_token_ids == (2,)


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
        ({"model": "llama"}, r"tokenizer.ggml.model must be gpt2 \(byte-level BPE\), found 'llama'"),
        ({"pre": "qwen9"}, "tokenizer.ggml.pre must be one of default, gpt-2, .* the checkpoint has 'qwen9'"),
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
