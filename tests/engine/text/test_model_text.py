from __future__ import annotations

import dataclasses

import pytest

from engine.errors import FormatError, RequestError
from engine.models.spec import ModelInfo
from engine.text import ModelText
from engine.weights import PackedModel


@pytest.fixture(scope="module")
def info(default_model: PackedModel) -> ModelInfo:
    return default_model.info


@pytest.fixture(scope="module")
def text(info: ModelInfo) -> ModelText:
    return ModelText.from_info(info)


def test_a_conversation_there_and_back(text: ModelText) -> None:
    ids = text.encode_chat([{"role": "user", "content": "Où est Zoë?"}])
    shown = text.decode(ids)
    assert shown.endswith("user\nOù est Zoë?\nassistant\n")
    assert "<|im_start|>" not in shown
    stream = text.stream(stop=["Zoë"], min_tokens=0)
    emitted = ""
    for token_id in ids:
        emitted += stream.push(token_id)
        if stream.stopped:
            break
    assert emitted == shown[: shown.index("Zoë")]


def test_plain_text(text: ModelText) -> None:
    assert text.decode(text.encode("a <|im_end|> b")) == "a <|im_end|> b"
    assert text.tokenizer.vocab_size == 49152


def test_the_operator_s_template_takes_the_model_s_place(info: ModelInfo) -> None:
    text = ModelText.from_info(info, chat_template="{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    ids = text.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert (ids[0], ids[-1]) == (info.bos_token_id, info.eos_token_ids[0])
    assert not {info.bos_token_id, *info.eos_token_ids} & set(ids[1:-1])
    with pytest.raises(FormatError, match="chat template"):
        ModelText.from_info(info, chat_template="{% if %}")


def test_a_model_without_a_template_holds_no_conversations(info: ModelInfo) -> None:
    text = ModelText.from_info(dataclasses.replace(info, chat_template=None))
    with pytest.raises(RequestError, match="no chat template") as caught:
        text.encode_chat([{"role": "user", "content": "Hi"}])
    assert caught.value.code == "no_chat_template"
    assert text.encode("Hi")
