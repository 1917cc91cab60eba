from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.errors import FormatError, RequestError
from engine.models.spec import ModelInfo
from engine.text import ModelText
from engine.weights import PackedModel
from engine.weights.gguf_tokenizer import read_tokenizer
from tests.engine.text.test_model_templates import LLAMA2
from tests.engine.weights.vocabularies import gguf_metadata


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


def test_tools_that_are_nested_without_end(text: ModelText) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(5000):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(RequestError, match="nested too deeply"):
        text.encode_chat([{"role": "user", "content": "Hi"}], tools=[tool])


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


@pytest.fixture(scope="module")
def llama2(info: ModelInfo) -> ModelText:
    """A model with a SentencePiece vocabulary, smaller than its embedding, and a template of that kind."""
    found = read_tokenizer(gguf_metadata("llama"), Path("model.gguf"))
    names = ("tokenizer_json", "bos_token_id", "eos_token_ids", "add_bos", "special_token_ids")
    changes = {name: getattr(found, name) for name in names}
    return ModelText.from_info(dataclasses.replace(info, chat_template=LLAMA2, **changes))


def test_one_bos_whether_the_template_or_the_tokenizer_puts_it_there(llama2: ModelText) -> None:
    assert llama2.encode_chat([{"role": "user", "content": "<s> Hi"}]).count(1) == 1
    assert llama2.encode("<s> Hi").count(1) == 1
    assert llama2.encode("Hi", add_special_tokens=False).count(1) == 0
    assert llama2.encode("") == [1]


def test_a_conversation_of_a_sentencepiece_model(llama2: ModelText) -> None:
    ids = llama2.encode_chat([{"role": "user", "content": " Où est Zoë? 🧿 "}])
    assert llama2.decode(ids) == " Où est Zoë? 🧿 "  # [INST] and [/INST] are control tokens of this vocabulary
    answer = llama2.encode("the end🧿</s>", add_special_tokens=False)
    stream = llama2.stream(stop=["</s>"])
    assert "".join(map(stream.push, answer)) == " the end🧿"
    assert llama2.decode(answer) == "the end🧿</s>"
