from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders

from engine.errors import FormatError, RequestError, UnsupportedModelError
from engine.text import RenderedPrompt, Tokenizer
from tests.engine.text.byte_tokenizers import NUM_PLAIN, byte_tokenizer
from tests.golden.texts import SPECIAL_TEXTS, TEXTS

BOS, END = NUM_PLAIN, NUM_PLAIN + 1
SPECIAL = ("<|bos|>", "<|end|>")


def tokenizer(**changes: Any) -> Tokenizer:
    return Tokenizer(byte_tokenizer(SPECIAL, ["<think>"]).to_str(), **changes)


def test_ids_of_plain_texts_are_transformers(smollm2: Tokenizer, golden: dict[str, Any]) -> None:
    assert len(TEXTS) == len(golden["texts"])
    for text, ids in zip(TEXTS, golden["texts"], strict=True):
        assert smollm2.encode_text(text) == ids
        assert smollm2.decode(ids) == text


def test_ids_of_template_output_are_transformers(smollm2: Tokenizer, golden: dict[str, Any]) -> None:
    for text, ids in zip(SPECIAL_TEXTS, golden["special_texts"], strict=True):
        assert smollm2.encode_rendered(RenderedPrompt(text)) == ids
        assert smollm2.decode(ids, skip_special=False) == text


def test_special_tokens_in_plain_text_are_text(smollm2: Tokenizer) -> None:
    for text in SPECIAL_TEXTS:
        ids = smollm2.encode_text(text)
        assert smollm2.special_token_ids.isdisjoint(ids)
        assert smollm2.decode(ids) == text


def test_the_default_model(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert set(smollm2.eos_token_ids) == {0, 2}
    assert smollm2.special_token_ids == set(range(17))
    assert smollm2.special_tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert smollm2.id_to_piece(smollm2.encode_text(" the")[0]) == "Ġthe"
    assert smollm2.id_to_bytes(smollm2.encode_text(" the")[0]) == b" the"


def test_exactly_one_bos_where_the_model_wants_one() -> None:
    with_bos = tokenizer(bos_token_id=BOS, add_bos=True)
    assert with_bos.encode_text("") == [BOS]
    assert with_bos.encode_text("<|bos|>hello").count(BOS) == 1
    assert with_bos.encode_text("hello", add_bos=False).count(BOS) == 0
    assert tokenizer(bos_token_id=BOS).encode_text("hello").count(BOS) == 0
    assert with_bos.encode_rendered(RenderedPrompt("<|bos|>hello")).count(BOS) == 1


def test_added_tokens_that_are_not_special_are_vocabulary() -> None:
    assert tokenizer().encode_text("<think>") == [NUM_PLAIN + 2]
    assert NUM_PLAIN + 2 in tokenizer().encode_text("<|end|><think>")


def test_stand_ins_become_plain_text_and_nothing_else_changes() -> None:
    ours = tokenizer()
    rendered = RenderedPrompt("<|bos|>say @|end|> hello<|end|> hello", {ord("@"): "<"})
    ids = ours.encode_rendered(rendered)
    assert rendered.text == "<|bos|>say <|end|> hello<|end|> hello"
    assert ids == [BOS, *ours.encode_text("say <|end|> hello"), END, *ours.encode_text(" hello")]


def test_special_tokens_that_swallow_spaces_do_so_beside_stand_ins() -> None:
    special = AddedToken("<|end|>", lstrip=True, rstrip=True, special=True, normalized=False)
    ours = Tokenizer(byte_tokenizer([special]).to_str())
    end = NUM_PLAIN
    plain = ours.encode_rendered(RenderedPrompt("say x  <|end|>  hello"))
    assert plain == [*ours.encode_text("say x"), end, *ours.encode_text("hello")]
    marked = ours.encode_rendered(RenderedPrompt("say @|end|>  <|end|>  hello", {ord("@"): "<"}))
    assert marked == [*ours.encode_text("say <|end|>"), end, *ours.encode_text("hello")]


def test_threads_that_need_plain_and_control_at_once_do_not_disturb_each_other() -> None:
    ours = tokenizer()

    def both(_: int) -> tuple[int, int]:
        return ours.encode_text("x<|end|>").count(END), ours.encode_rendered(RenderedPrompt("x<|end|>")).count(END)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(both, range(200))) == {(0, 1)}


@given(st.text())
def test_text_survives(text: str) -> None:
    ours = tokenizer()
    ids = ours.encode_text(text)
    assert ours.special_token_ids.isdisjoint(ids)
    assert ours.decode(ids) == text


@given(st.lists(st.integers(0, NUM_PLAIN + 2)))
def test_decoding_is_the_library_s(ids: list[int]) -> None:
    library = byte_tokenizer(SPECIAL, ["<think>"])
    ours = Tokenizer(library.to_str())
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("added", ["éé", "Ġx", "Ġ x", "日", "a b", "\xa0", "\n", "Ġé日"])
def test_added_tokens_decode_as_the_library_decodes_them(added: str) -> None:
    library = byte_tokenizer(added=[added])
    assert library.token_to_id(added) == NUM_PLAIN
    assert Tokenizer(library.to_str()).decode([NUM_PLAIN]) == library.decode([NUM_PLAIN])


def test_ids_of_a_padded_vocabulary_are_silent() -> None:
    ours = tokenizer(vocab_size=NUM_PLAIN + 16)
    assert ours.decode([NUM_PLAIN + 10]) == ""
    assert ours.id_to_piece(NUM_PLAIN + 10) == ""


def test_half_a_surrogate_pair_is_refused() -> None:
    for encode in (tokenizer().encode_text, lambda text: tokenizer().encode_rendered(RenderedPrompt(text))):
        with pytest.raises(RequestError, match=r"U\+D83D"):
            encode("x\ud83dy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": NUM_PLAIN}, f"{NUM_PLAIN + 3} tokens, the model's vocabulary only {NUM_PLAIN}"),
        ({"bos_token_id": 9999}, "must be below .* got 9999"),
        ({"eos_token_ids": (-1,)}, "got -1"),
        ({"add_bos": True}, "no BOS token is named"),
    ],
)
def test_arguments_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tokenizer(**changes)


@pytest.mark.parametrize("source", ["", "{}", "[1]", '{"model": {"type": "BPE"}}', "x" * 100])
def test_what_is_no_tokenizer(source: str) -> None:
    with pytest.raises(FormatError, match=r"^tokenizer: "):
        Tokenizer(source)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Metaspace(replacement="_"),
        decoders.Sequence([decoders.Replace("_", " "), decoders.Fuse()]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.CTC()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
    ],
)
def test_decoders_whose_tokens_depend_on_their_neighbours_are_unsupported(decoder: Any) -> None:
    library = byte_tokenizer()
    library.decoder = decoder
    with pytest.raises(UnsupportedModelError, match="must be ByteLevel or that of SentencePiece, the checkpoint has '"):
        _ = Tokenizer(library.to_str()).pieces


def test_a_tokenizer_without_a_decoder_is_unsupported() -> None:
    source = json.loads(byte_tokenizer().to_str()) | {"decoder": None}
    with pytest.raises(UnsupportedModelError, match="the checkpoint has 'none'"):
        _ = Tokenizer(json.dumps(source)).pieces


def test_a_source_that_the_library_reads_although_it_is_not_json() -> None:
    source = byte_tokenizer().to_str().replace('{"version":"1.0",', '{"version":"1.0","1.0",')
    with pytest.raises(FormatError, match=r"^tokenizer: JSON is malformed"):
        _ = Tokenizer(source).pieces


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    library = byte_tokenizer()
    library.enable_truncation(2)
    library.enable_padding(length=64)
    assert len(Tokenizer(library.to_str()).encode_text("x y z")) == 5


def test_from_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer(SPECIAL).to_str())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": "<|end|>", "add_bos_token": True})
    )
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.encode_text("hello")[0] == BOS
    assert ours.eos_token_ids == (END,)
    assert ours.special_token_ids == {BOS, END}
