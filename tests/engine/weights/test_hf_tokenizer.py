from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from engine.errors import FormatError
from engine.weights.hf_tokenizer import read_tokenizer_folder
from tests.engine.text.byte_tokenizers import NUM_PLAIN, byte_tokenizer

SPECIAL = ("<s>", "</s>", "<|im_end|>", "<pad>")
BOS, EOS, IM_END, PAD = range(NUM_PLAIN, NUM_PLAIN + 4)


def write(folder: Path, tokenizer: Tokenizer | None = None, **configs: Any) -> Path:
    """A folder with a tokenizer and the named JSON files."""
    (folder / "tokenizer.json").write_text((tokenizer or byte_tokenizer(SPECIAL)).to_str())
    for name, config in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder


def with_bos_in_front() -> Tokenizer:
    tokenizer = byte_tokenizer(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def test_every_end_token_that_a_file_names_is_collected(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
        generation_config={"eos_token_id": [PAD, EOS]},
        config={"eos_token_id": PAD},
    )
    found = read_tokenizer_folder(folder)
    assert found.eos_token_ids == (EOS, PAD, IM_END)
    assert (found.bos_token_id, found.add_bos) == (BOS, False)
    assert found.special_token_ids == (BOS, EOS, IM_END, PAD)
    assert found.vocab_size == NUM_PLAIN + 4


def test_the_tokenizer_alone_is_enough(tmp_path: Path) -> None:
    found = read_tokenizer_folder(write(tmp_path))
    assert (found.bos_token_id, found.add_bos, found.chat_template) == (None, False, None)
    assert set(found.eos_token_ids) == {EOS, IM_END}  # well-known names


def test_bos_from_the_generation_config(tmp_path: Path) -> None:
    assert read_tokenizer_folder(write(tmp_path, generation_config={"bos_token_id": BOS})).bos_token_id == BOS


def test_whether_text_gets_bos(tmp_path: Path) -> None:
    bos = {"bos_token": "<s>"}
    assert read_tokenizer_folder(write(tmp_path, with_bos_in_front(), tokenizer_config=bos)).add_bos
    assert not read_tokenizer_folder(
        write(tmp_path, with_bos_in_front(), tokenizer_config={**bos, "add_bos_token": False})
    ).add_bos
    assert read_tokenizer_folder(write(tmp_path, tokenizer_config={**bos, "add_bos_token": True})).add_bos


def test_chat_template(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    assert read_tokenizer_folder(write(tmp_path, tokenizer_config={"chat_template": "C"})).chat_template == "C"
    assert read_tokenizer_folder(write(tmp_path, tokenizer_config={"chat_template": named})).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert read_tokenizer_folder(tmp_path).chat_template == "J"


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tokenizer_config", [], "must be a JSON object, found list"),
        ("tokenizer_config", {"bos_token": "<none>"}, "bos_token must be a token of the vocabulary, found '<none>'"),
        ("tokenizer_config", {"bos_token": 3}, "found 3"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token must be a bool, found 'yes'"),
        ("tokenizer_config", {"chat_template": 3}, "chat_template must be a string, found int"),
        ("generation_config", {"eos_token_id": [1, "2"]}, "eos_token_id must hold ids of the vocabulary, found '2'"),
        ("generation_config", {"eos_token_id": 99999}, "found 99999"),
        ("config", {"eos_token_id": True}, "found True"),
    ],
)
def test_bad_values_name_file_and_value(tmp_path: Path, name: str, config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_tokenizer_folder(write(tmp_path, **{name: config}))
    assert caught.value.path == tmp_path / f"{name}.json"


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"version": "1.0"}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer", "config"])
def test_damaged_files(tmp_path: Path, name: str, damage: bytes) -> None:
    path = write(tmp_path) / f"{name}.json"
    path.write_bytes(damage)
    if (name, damage) == ("config", b'{"version": "1.0"}'):
        assert read_tokenizer_folder(tmp_path).vocab_size == NUM_PLAIN + 4
        return
    with pytest.raises(FormatError) as caught:
        read_tokenizer_folder(tmp_path)
    assert caught.value.path == path


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: the file is missing"):
        read_tokenizer_folder(tmp_path)
