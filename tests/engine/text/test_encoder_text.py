from __future__ import annotations

import json

import pytest

from engine.errors import FormatError, RequestError
from engine.request import TextInput
from engine.text import EncoderText, Tokenizer
from engine.text.encoder_text import cut
from engine.text.tokenizer import WholeText
from tests.tiny_encoders import VOCAB, VOCAB_SIZE, tokenizer_json

CLS, SEP = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")


def make(*, pairs_have_types: bool = True, max_input_len: int = 20) -> EncoderText:
    return EncoderText(
        Tokenizer(tokenizer_json(pairs_have_types=pairs_have_types), vocab_size=VOCAB_SIZE), max_input_len
    )


def ids(*tokens: str) -> list[int]:
    return [VOCAB.index(token) for token in tokens]


def test_texts_stand_between_the_template_s_tokens() -> None:
    texts = make().encode_texts(["The river", "", "what is water?"])
    assert [text.token_ids for text in texts] == [
        [CLS, *ids("the", "river"), SEP],
        [CLS, SEP],
        [CLS, *ids("what", "is", "water", "?"), SEP],
    ]
    assert all(text.second is None for text in texts)


def test_pairs_are_told_apart_where_the_model_does_that() -> None:
    pair = [("what", "water is")]
    (typed,) = make().encode_texts(pair)
    assert typed == TextInput([CLS, *ids("what"), SEP, *ids("water", "is"), SEP], 3)
    (untyped,) = make(pairs_have_types=False).encode_texts(pair)
    assert untyped == TextInput(typed.token_ids, None)


def test_special_tokens_in_a_text_are_text() -> None:
    hostile, plain = make().encode_texts(["the [SEP] river", "the river"])
    assert hostile.token_ids.count(SEP) == 1 and len(hostile.token_ids) > len(plain.token_ids)
    assert plain.token_ids == [CLS, *ids("the", "river"), SEP]


def test_a_text_that_is_too_long_is_refused_by_its_index() -> None:
    with pytest.raises(RequestError, match="input 1 must have 1 to 20 tokens, got 32") as caught:
        make().encode_texts(["the", "water " * 30])
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


@pytest.mark.parametrize("truncate, length", [(-1, 20), (20, 20), (7, 7), (2, 2), (1, 1)])
def test_truncation_keeps_the_beginning_and_the_template_s_end(truncate: int, length: int) -> None:
    (text,) = make().encode_texts(["water " * 30], truncate=truncate)
    expected = [CLS, *ids("water") * 30]
    assert text.token_ids == ([*expected[: length - 1], SEP] if length > 1 else [CLS])


@pytest.mark.parametrize("truncate", [0, -2, 21])
def test_a_truncation_that_is_none_is_refused(truncate: int) -> None:
    with pytest.raises(RequestError, match=f"must be -1 or from 1 to 20, got {truncate}"):
        make().encode_texts(["the"], truncate=truncate)


def test_a_cut_keeps_types() -> None:
    whole = WholeText([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1])
    assert cut(whole, 5) == ([1, 2, 3, 4, 6], [0, 0, 0, 1, 1])


def test_a_template_with_a_token_that_it_does_not_have_is_malformed() -> None:
    broken = json.loads(tokenizer_json(pairs_have_types=True))
    del broken["post_processor"]["special_tokens"]["[SEP]"]
    with pytest.raises(FormatError, match="tokenizer: "):
        EncoderText(Tokenizer(json.dumps(broken), vocab_size=VOCAB_SIZE), 20)


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        make().encode_texts(["the", ("river", "\ud800")])
