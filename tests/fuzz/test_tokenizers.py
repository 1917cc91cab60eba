"""Tokenizers: GGUF metadata, tokenizer.json, tokenizer.model and the configurations beside them.

What was read is used: a tokenizer that loads must also encode, decode and stream, or say why not.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.text import Detokenizer, Tokenizer
from engine.weights.gguf_tokenizer import TokenizerInfo, read_tokenizer
from engine.weights.hf_tokenizer import read_tokenizer_folder
from tests.engine.text.byte_tokenizers import byte_tokenizer
from tests.engine.weights.vocabularies import gguf_metadata, model_path
from tests.fuzz.documents import changed, encoded
from tests.fuzz.documents import values as documents
from tests.fuzz.harness import fuzz, limited, ours, peak_bytes
from tests.fuzz.strategies import Sample, damaged, names
from tests.tiny_gguf import TinyLlama

TEXTS = ("", "Hello, wörld 12345 \n\t\u2581 \U0001f600 <|im_end|></s><s>", "a" * 300)


def use(info: TokenizerInfo) -> None:
    tokenizer = Tokenizer(
        info.tokenizer_json,
        vocab_size=info.vocab_size,
        bos_token_id=info.bos_token_id,
        eos_token_ids=info.eos_token_ids,
        add_bos=info.add_bos,
        special_token_ids=info.special_token_ids,
    )
    assert len(tokenizer.pieces) == info.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode_text(text)
        assert all(0 <= token_id < info.vocab_size for token_id in ids)
        stream = Detokenizer(tokenizer, stop=["zz"])
        streamed = "".join(map(stream.push, ids)) + stream.flush()
        decoded = tokenizer.decode(ids)
        # A stream goes on where something was before, so it keeps a first space that belongs to no text of its own.
        assert "zz" in decoded or streamed in (decoded, " " + decoded)


# GGUF metadata


@cache
def bases() -> dict[str, dict[str, Any]]:
    tiny = {key: value for key, value in TinyLlama(vocab=290).metadata.items() if key.startswith("tokenizer.")}
    tiny["tokenizer.ggml.token_type"] = np.array(tiny["tokenizer.ggml.token_type"], np.int32)
    return {"gpt2": tiny, "llama": gguf_metadata("llama"), "user_defined": gguf_metadata("user_defined")}


@st.composite
def metadata(draw: st.DrawFn) -> dict[str, object]:
    made: dict[str, object] = dict(bases()[draw(st.sampled_from(sorted(bases())))])
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.sampled_from(sorted(made)) | st.sampled_from(["tokenizer.ggml.precompiled_charsmap", "tokenizer.x"])
        )
        old = made.get(key)
        if isinstance(old, list | np.ndarray) and draw(st.booleans()):
            made[key] = draw(_items(old))
        elif draw(st.integers(0, 4)) == 0:
            made.pop(key, None)
        else:
            arrays = st.sampled_from([np.zeros(0), np.array([True]), np.full(290, np.nan, np.float32), np.arange(290)])
            model = st.sampled_from(["llama", "gpt2", "bert", "llama-bpe", "default"])
            made[key] = draw(
                arrays | model | names | st.integers(-2, 400) | st.booleans() | st.lists(names, max_size=3)
            )
    return made


_KINDS = [0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1]


@st.composite
def _items(draw: st.DrawFn, old: list[str] | np.ndarray) -> object:
    """Another list of strings, or array, of nearly the same values."""
    items: list[Any] = list(old)
    if not items:
        return old
    at = draw(st.integers(0, len(items) - 1))
    match draw(st.sampled_from(["change", "change", "cut", "double", "swap"])):
        case "change" if isinstance(old, np.ndarray):
            items[at] = old.dtype.type(
                draw(st.sampled_from([0, 1e30, np.inf, np.nan] if old.dtype.kind == "f" else _KINDS))
            )
        case "change":
            items[at] = draw(names | st.sampled_from([*items[:300], "a b", "  ", "<0x41>", "<0xGG>", "\u2581"]))
        case "cut":
            del items[at:]
        case "double":
            items.insert(at, items[at])
        case _:
            items[at], items[-1] = items[-1], items[at]
    return np.array(items, old.dtype) if isinstance(old, np.ndarray) else items


@fuzz(120, made=metadata())
def test_gguf_metadata(folder: Path, made: dict[str, object]) -> None:
    path = folder / "m.gguf"
    with ours(path=path):
        info = read_tokenizer(made, path)
        with ours():
            use(info)


# A folder's files


@cache
def tokenizer_json() -> Any:
    return json.loads(byte_tokenizer(["<s>", "</s>", "<|im_end|>"], ["<think>"]).to_str())


CONFIGS = {
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "x"}],
        "added_tokens_decoder": {
            "0": {"content": "<unk>", "special": True},
            "400": {"content": "<a>", "special": False},
        },
    },
    "generation_config.json": {"bos_token_id": 264, "eos_token_id": [265, 266], "temperature": 0.5},
    "config.json": {"eos_token_id": 265, "vocab_size": 300},
    "added_tokens.json": {"<b>": 400},
}


def read(folder: Path, files: dict[str, bytes]) -> None:
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with ours(path=folder):
        info = read_tokenizer_folder(folder)
        with ours():
            use(info)


@fuzz(150, made=st.deferred(lambda: changed(tokenizer_json())))
def test_tokenizer_json(folder: Path, made: Any) -> None:
    read(folder, {"tokenizer.json": encoded(made)})


@fuzz(60, data=st.deferred(lambda: damaged(Sample(encoded(tokenizer_json())))))
def test_damaged_tokenizer_json(folder: Path, data: bytes) -> None:
    read(folder, {"tokenizer.json": data})


@fuzz(80, name=st.sampled_from(sorted(CONFIGS)), data=st.data(), with_model=st.booleans())
def test_configurations(folder: Path, name: str, data: st.DataObject, with_model: bool) -> None:
    files = {other: encoded(config) for other, config in CONFIGS.items() if other == name or not with_model}
    files[name] = encoded(data.draw(changed(CONFIGS[name]) | documents))
    if with_model:
        files["tokenizer.model"] = model_path("llama").read_bytes()
    else:
        files["tokenizer.json"] = encoded(tokenizer_json())
    read(folder, files)


@fuzz(120, name=st.sampled_from(["llama", "defaults", "user_defined"]), data=st.data())
def test_tokenizer_model(folder: Path, name: str, data: st.DataObject) -> None:
    read(folder, {"tokenizer.model": data.draw(damaged(Sample(model_path(name).read_bytes())))})


@fuzz(25, data=st.data())
def test_memory(folder: Path, data: st.DataObject) -> None:
    model = data.draw(damaged(Sample(model_path("llama").read_bytes())))
    assert peak_bytes(lambda: read(folder, {"tokenizer.model": model})) < (8 << 20) + 100 * len(model)


def test_claims_of_size_in_a_process_of_bounded_memory(tmp_path: Path) -> None:
    """The library allocates outside Python: ids, counts and depths that are larger than anything in the file."""
    base = tokenizer_json()
    made = []
    for token_id in (2**22, 2**31, 2**32 - 1, 2**40):
        made.append({**base, "model": {**base["model"], "vocab": {**base["model"]["vocab"], "zz": token_id}}})
        made.append({**base, "added_tokens": [{**base["added_tokens"][0], "id": token_id}]})
    made.append(
        {**base, "truncation": {"direction": "Right", "max_length": 2**60, "strategy": "LongestFirst", "stride": 0}}
    )
    made.append({**base, "padding": {
        "strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "x",
    }})  # fmt: skip
    nested: Any = base["decoder"]
    for _ in range(3000):
        nested = {"type": "Sequence", "decoders": [nested]}
    paths = []
    for i, document in enumerate(
        [*made, *({**base, key: nested} for key in ("decoder", "pre_tokenizer", "normalizer"))]
    ):
        paths.append(tmp_path / str(i))
        paths[-1].mkdir()
        (paths[-1] / "tokenizer.json").write_text(_dumps(document))
    script = """
        from pathlib import Path
        from engine.errors import SeraphError
        from engine.text import Tokenizer
        limit()
        for folder in given:
            try:
                tokenizer = Tokenizer.from_folder(Path(folder))
                print(len(tokenizer.pieces), len(tokenizer.encode_text("Hello")))
            except SeraphError as error:
                print(type(error).__name__, error)
    """
    said = limited(script, list(map(str, paths)), megabytes=512)
    assert len(said) == len(paths), said


def _dumps(document: Any) -> str:
    """json.dumps for documents deeper than Python's own recursion allows."""
    marks = []

    def flat(value: Any) -> Any:
        depth = 0
        while isinstance(value, dict) and list(value) == ["type", "decoders"] and len(value["decoders"]) == 1:
            value, depth = value["decoders"][0], depth + 1
        if depth:
            head = '{"type": "Sequence", "decoders": [' * depth
            marks.append(head + json.dumps(value) + "]}" * depth)
            return f"@{len(marks) - 1}@"
        return value

    text = json.dumps({key: flat(value) for key, value in document.items()})
    for i, replacement in enumerate(marks):
        text = text.replace(f'"@{i}@"', replacement)
    return text
