from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from engine.errors import FormatError, ModelError, UnsupportedModelError
from engine.text import Tokenizer as TextTokenizer
from engine.weights.gguf_tokenizer import read_tokenizer
from engine.weights.hf_tokenizer import read_tokenizer_folder
from tests.engine.text.byte_tokenizers import NUM_PLAIN, byte_tokenizer
from tests.engine.weights.vocabularies import NAMES, gguf_metadata, golden, model_path
from tests.golden.texts import SENTENCEPIECE_TEXTS, SPECIAL_TEXTS, TEXTS

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


def test_a_token_id_that_would_make_a_table_of_gigabytes(tmp_path: Path) -> None:
    source = json.loads(byte_tokenizer(SPECIAL).to_str())
    source["model"]["vocab"]["Ġhello"] = 2**32 - 2
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(FormatError, match="token ids must be below 4194304, found 4294967294") as caught:
        read_tokenizer_folder(tmp_path)
    assert caught.value.path == tmp_path / "tokenizer.json"
    with pytest.raises(FormatError, match="token ids must be below 4194304, found 4294967294"):
        TextTokenizer(json.dumps(source))


def test_a_source_on_which_the_library_panics(tmp_path: Path) -> None:
    source = json.loads(read_tokenizer(gguf_metadata("llama"), tmp_path).tokenizer_json)
    source["model"]["continuing_subword_prefix"] = "\u2581\u2581\u2581"  # longer than what it is cut off from
    (tmp_path / "tokenizer.json").write_text(json.dumps(source))
    with pytest.raises(FormatError) as caught:
        read_tokenizer_folder(tmp_path)
    assert caught.value.path == tmp_path / "tokenizer.json"


@cache
def sources() -> list[Any]:
    """Serialized tokenizers of both kinds, and one with a post-processor."""
    texts = [
        with_bos_in_front().to_str(),
        *(read_tokenizer(gguf_metadata(name), Path()).tokenizer_json for name in NAMES),
    ]
    return [json.loads(text) for text in texts]


ODD_VALUES: tuple[Any, ...] = (None, 0, -1, 2**31, 2**64, 1.5, "", "a", "\u2581", True, [], {})


@settings(max_examples=60)
@given(st.data())
def test_damaged_tokenizers_fail_cleanly_or_work(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A few values anywhere in a tokenizer.json are replaced or taken out."""
    damaged = copy.deepcopy(data.draw(st.sampled_from(sources())))
    for _ in range(data.draw(st.integers(1, 3))):
        parent: Any = {"": damaged}
        key: Any = ""
        while isinstance(parent[key], dict | list) and parent[key] and (key == "" or data.draw(st.booleans())):
            parent = parent[key]
            key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
        if isinstance(parent, dict) and data.draw(st.booleans()):
            del parent[key]
        else:
            parent[key] = data.draw(st.sampled_from(ODD_VALUES))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_text(json.dumps(damaged))
    with suppress(ModelError):
        text = TextTokenizer.from_folder(folder)
        text.decode(text.encode_text("a b \u2581 é<s>☠"))


@pytest.mark.parametrize("unknown", ["", "nowhere"])
def test_an_unknown_token_that_the_vocabulary_lacks(tmp_path: Path, unknown: str) -> None:
    """Refused where some text would need it; where bytes or characters cover every text it is never looked for."""
    refused = 0
    for number, source in enumerate(sources()):
        folder = tmp_path / str(number)
        folder.mkdir()
        damaged = copy.deepcopy(source)
        damaged["model"]["unk_token"] = unknown
        (folder / "tokenizer.json").write_text(json.dumps(damaged))
        try:
            text = TextTokenizer.from_folder(folder)
        except FormatError as error:
            assert "not found in the vocabulary" in str(error)
            refused += 1
        else:
            assert text.encode_text("a b é☠\U000f0000")
    assert refused == 1


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json: the file is missing, and there is no tokenizer\.model"):
        read_tokenizer_folder(tmp_path)


def sentencepiece_folder(folder: Path, name: str = "llama", **configs: Any) -> Path:
    """A folder with a SentencePiece model and the named JSON files."""
    shutil.copy(model_path(name), folder / "tokenizer.model")
    for file, config in configs.items():
        (folder / f"{file}.json").write_text(json.dumps(config))
    return folder


def added(text: str, **fields: Any) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **fields}


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_a_sentencepiece_model_only(tmp_path: Path, name: str) -> None:
    found = read_tokenizer_folder(sentencepiece_folder(tmp_path, name))
    tokenizer = Tokenizer.from_str(found.tokenizer_json)
    tokenizer.encode_special_tokens = True
    texts = (*TEXTS, *SPECIAL_TEXTS, *SENTENCEPIECE_TEXTS)
    for text, ids in zip(texts, golden()["sentencepiece"][name]["texts"], strict=True):
        assert tokenizer.encode(text).ids == ids, text
    assert (found.bos_token_id, found.eos_token_ids, found.add_bos, found.chat_template) == (1, (2,), True, None)


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    assert read_tokenizer_folder(write(sentencepiece_folder(tmp_path))).vocab_size == NUM_PLAIN + 4


def test_configurations_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    tokenizer_config = {
        "bos_token": "[INST]",
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
        "chat_template": "T",
        "added_tokens_decoder": {
            "0": added("<unk>", special=True),
            "899": added(tokens_of("llama")[899], special=True),
            "901": added("<|im_end|>", special=True),
        },
    }
    folder = sentencepiece_folder(
        tmp_path, tokenizer_config=tokenizer_config, added_tokens={"<tool>": 902, "<think>": 900, "<|im_end|>": 901}
    )
    found = read_tokenizer_folder(folder)
    assert (found.vocab_size, found.bos_token_id, found.add_bos, found.chat_template) == (903, 3, False, "T")
    assert found.eos_token_ids == (901, 2)
    assert found.special_token_ids == (0, 1, 2, 3, 4, 899, 901)
    tokenizer = Tokenizer.from_str(found.tokenizer_json)
    assert tokenizer.encode("<think><tool><|im_end|>").ids == [900, 902, 901]


def tokens_of(name: str) -> list[str]:
    return [token for token, _ in golden()["sentencepiece"][name]["pieces"]]


@pytest.mark.parametrize(
    ("config", "value", "message"),
    [
        ("added_tokens", {"x": 901}, "added token's id must be at most 900, found 901 for 'x'"),
        ("added_tokens", {"x": "900"}, "id must be at most 900, found '900' for 'x'"),
        ("added_tokens", {"x": 900, "y": 900}, "added token 900 must be 'x', as in the vocabulary, found 'y'"),
        ("added_tokens", {"<s>": 2}, "added token 2 must be '</s>', as in the vocabulary, found '<s>'"),
        ("added_tokens", [], "must be a JSON object, found list"),
        ("tokenizer_config", {"added_tokens_decoder": []}, None),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder must be an object of objects"),
        ("tokenizer_config", {"added_tokens_decoder": {"900": "x"}}, "must be an object of objects"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": added("x")}}, "id must be at most 900, found 'x'"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"900": added("")}},
            "900 must have a text and be special or not",
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"900": added("x", special=1)}}, "be special or not"),
    ],
)
def test_added_tokens_that_do_not_fit(tmp_path: Path, config: str, value: Any, message: str | None) -> None:
    folder = sentencepiece_folder(tmp_path, **{config: value})
    if message is None:
        assert read_tokenizer_folder(folder).vocab_size == 900
        return
    with pytest.raises(FormatError, match=message) as caught:
        read_tokenizer_folder(folder)
    assert caught.value.path == folder / f"{config}.json"


def test_added_tokens_that_take_spaces_along_need_a_tokenizer_json(tmp_path: Path) -> None:
    decoder = {"added_tokens_decoder": {"900": added("<x>", rstrip=True)}}
    with pytest.raises(UnsupportedModelError, match=r"added token 900 takes spaces .* with a tokenizer\.json only"):
        read_tokenizer_folder(sentencepiece_folder(tmp_path, tokenizer_config=decoder))


def test_a_sentencepiece_model_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    with pytest.raises(FormatError, match="a number is cut short") as caught:
        read_tokenizer_folder(tmp_path)
    assert (caught.value.path, caught.value.offset) == (tmp_path / "tokenizer.model", 1)


def test_chat_templates_with_names_that_are_no_names(tmp_path: Path) -> None:
    named = [{"name": ["default"], "template": "A"}, {"name": "default", "template": "B"}, 7]
    assert read_tokenizer_folder(write(tmp_path, tokenizer_config={"chat_template": named})).chat_template == "B"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(FormatError, match=r"tokenizer\.json: it is not a file"):
        read_tokenizer_folder(tmp_path)
