"""`export_folder`: what is read of the folder is what is read of the GGUF file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize as dequantize_stored
from numpy.typing import NDArray
from tokenizers import Tokenizer as LibraryTokenizer

from engine.config import DEFAULT_MODEL, FOLDER_DTYPES
from engine.errors import ConfigError, FormatError, SourceError, UnsupportedModelError
from engine.kernels.layout import dequantize, from_bf16, to_bf16, unpack_bf16
from engine.models.rope import alike, llama3_factors
from engine.models.spec import ModelInfo
from engine.text.chat_template import ChatTemplate
from engine.text.tokenizer import Tokenizer
from engine.weights import PackedModel, export_folder, load_model, model_id
from engine.weights.checkpoint import Checkpoint, open_checkpoint
from engine.weights.convert import convert
from engine.weights.folder import INDEX, WHOLE, FolderCheckpoint
from engine.weights.progress import NoProgress
from engine.weights.tensor_types import FLOAT_TYPES
from tests.engine.weights import vocabularies
from tests.tiny_families import FAMILIES, tiny_folder, tiny_gguf
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder

ROOT = Path(__file__).parents[3]
SIZES: dict[str, int] = {"hidden": 96, "layers": 7, "heads": 4, "kv_heads": 2, "head_dim": 48, "ffn": 160}
PHI_SIZES: dict[str, int] = {**SIZES, "hidden": 64, "head_dim": 16}
TEXTS = ("", " ", "the theme of their  other\n\n\tnotes", "12 äö 漢字 🎉", "<|im_end|>x", "a</s>b")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def info_of(path: Path) -> ModelInfo:
    with open_checkpoint(path) as checkpoint:
        info, _ = convert(checkpoint)
        return info


def values_of(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """A whole tensor of a folder."""
    tensor = checkpoint.tensors[name]
    num_rows = int(np.prod(tensor.shape[:-1], dtype=int))
    return FLOAT_TYPES[tensor.type_name](checkpoint.read_rows(name, 0, num_rows)).reshape(tensor.shape)


def assert_same_model(gguf: Path, folder: Path) -> None:
    """All that is known of a model beside its weights."""
    ours, theirs = info_of(folder), info_of(gguf)
    assert len(ours.spec.ropes()) == len(theirs.spec.ropes())
    assert all(map(alike, ours.spec.ropes(), theirs.spec.ropes()))
    assert replace(ours.spec, rope=theirs.spec.rope, local_rope=theirs.spec.local_rope) == theirs.spec
    text = {"chat_template", "bos_token_id", "eos_token_ids", "add_bos", "special_token_ids", "generation_defaults"}
    assert {key: getattr(ours, key) for key in text} == {key: getattr(theirs, key) for key in text}
    tokenizers = [Tokenizer.from_info(info) for info in (ours, theirs)]
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    for one in TEXTS:
        first, second = (tokenizer.encode_text(one) for tokenizer in tokenizers)
        assert first == second
        if not any(tokenizers[0].id_to_piece(i) in one for i in ours.special_token_ids):
            assert library.encode(one).ids == first  # BOS included, which transformers leaves to the file


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_every_family_comes_back(tmp_path: Path, home: Path, name: str) -> None:
    sizes = PHI_SIZES if name == "phi3" else SIZES
    if name == "llama":
        model = TinyFolder(**sizes, tie=False)  # type: ignore[arg-type]  # sizes alone
        gguf = model.as_gguf("F32").write(tmp_path / "model.gguf")
    else:
        model = tiny_folder(name, **sizes)
        gguf = tiny_gguf(name, model, "F32", head_dim=sizes["head_dim"]).write(tmp_path / "model.gguf")
    folder = export_folder(str(gguf), tmp_path / "folder", dtype="float32", home=home)
    assert_same_model(gguf, folder)
    with FolderCheckpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == model.tensors.keys()
        for key, values in model.tensors.items():
            if name in FAMILIES and FAMILIES[name].norm_plus and values.ndim == 1:
                values = (values + np.float32(1)) - np.float32(1)  # what the GGUF file has left of them
            np.testing.assert_array_equal(values_of(checkpoint, key), values, err_msg=key)
    config = json.loads((folder / "config.json").read_text())
    assert [config[key] for key in ("model_type", "architectures")] == [
        model.config[key] for key in ("model_type", "architectures")
    ]


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("dtype", FOLDER_DTYPES)
def test_weights_are_rounded_once(tmp_path: Path, home: Path, quant: str, dtype: str) -> None:
    gguf = TinyLlama(hidden=256, layers=1, heads=4, kv_heads=2, head_dim=64, ffn=256, quant=quant, tie=False).write(
        tmp_path / "model.gguf"
    )
    stored = {
        tensor.name: dequantize_stored(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        for tensor in GGUFReader(gguf).tensors
    }

    def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
        match dtype:
            case "float16":
                return values.astype(np.float16).astype(np.float32)
            case "bfloat16":
                return from_bf16(to_bf16(values))
        return values

    with FolderCheckpoint(export_folder(str(gguf), tmp_path / "folder", dtype=dtype, home=home)) as checkpoint:
        for theirs, name in (
            ("token_embd", "model.embed_tokens"),
            ("output", "lm_head"),
            ("output_norm", "model.norm"),
            ("blk.0.attn_output", "model.layers.0.self_attn.o_proj"),
            ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
        ):
            np.testing.assert_array_equal(
                values_of(checkpoint, f"{name}.weight"), rounded(stored[f"{theirs}.weight"]), err_msg=name
            )
        turned = stored["blk.0.attn_k.weight"].reshape(2, 32, 2, 256).transpose(0, 2, 1, 3).reshape(128, 256)
        found = values_of(checkpoint, "model.layers.0.self_attn.k_proj.weight")
        np.testing.assert_array_equal(found, rounded(turned))


def test_the_default_model(default_model: PackedModel, tmp_path: Path) -> None:
    """Its packed weights are those of the file, and the folder's those rounded to bfloat16."""
    folder = export_folder(DEFAULT_MODEL, tmp_path / "folder")
    made = load_model(str(folder), home=tmp_path / "home")
    assert made.info.spec == default_model.info.spec
    assert made.info.generation_defaults == default_model.info.generation_defaults
    for name, tensor in default_model.weights.items():
        other = made.weights[name]
        if tensor.format is None:
            np.testing.assert_array_equal(other.data, from_bf16(to_bf16(tensor.data.view(np.float32))), err_msg=name)
            continue
        assert other.format is not None
        bits = unpack_bf16(other.format, other.data.view(np.uint8))
        np.testing.assert_array_equal(
            bits, to_bf16(dequantize(tensor.format, tensor.data.view(np.uint8))), err_msg=name
        )
    messages = [{"role": "user", "content": "What is 2+2?"}]
    rendered = [
        ChatTemplate(str(info.chat_template)).render(messages, add_generation_prompt=True)
        for info in (made.info, default_model.info)
    ]
    assert rendered[0] == rendered[1]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_gets_its_name_back(tmp_path: Path, home: Path, factor: float) -> None:
    model = TinyLlama(hidden=128, heads=2, kv_heads=1, head_dim=128, context=131072)
    model.metadata["llama.rope.freq_base"] = 500000.0
    factors = llama3_factors(
        500000.0, 128, factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    model.tensors["rope_freqs.weight"] = np.array(factors, np.float32)
    model.types["rope_freqs.weight"] = "F32"
    gguf = model.write(tmp_path / "model.gguf")
    folder = export_folder(str(gguf), tmp_path / "folder", home=home)
    assert_same_model(gguf, folder)
    assert json.loads((folder / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model.tensors["rope_freqs.weight"][3] = 2.0
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight must hold the factors of Llama 3\.1 or later"):
        export_folder(str(model.write(gguf)), tmp_path / "other", home=home)
    model.tensors["rope_freqs.weight"][:] = 1.0
    plain = export_folder(str(model.write(gguf)), tmp_path / "plain", home=home)
    assert json.loads((plain / "config.json").read_text())["rope_scaling"] is None


def test_a_scaling_that_says_more(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama()
    gguf.metadata |= {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.attn_factor": 0.5,
    }
    path = gguf.write(tmp_path / "model.gguf")
    assert_same_model(path, export_folder(str(path), tmp_path / "folder", home=home))


@pytest.mark.parametrize("name", vocabularies.NAMES)
def test_sentencepiece(tmp_path: Path, home: Path, name: str) -> None:
    metadata = vocabularies.gguf_metadata(name)
    metadata = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    model = TinyLlama(vocab=len(tokens))
    kept = {key: value for key, value in model.metadata.items() if not key.startswith("tokenizer.ggml.")}
    model.metadata = {**kept, **metadata}
    gguf = model.write(tmp_path / "model.gguf")
    folder = export_folder(str(gguf), tmp_path / "folder", home=home)
    assert_same_model(gguf, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["add_bos_token"]) == (tokens[1], True)
    assert config["unk_token"] == tokens[0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, {}),
        ({"temp": 0.0}, {"do_sample": False}),
        ({"temp": 0.5, "top_k": 40}, {"do_sample": True, "temperature": 0.5, "top_k": 40}),
    ],
)
def test_generation_config(tmp_path: Path, home: Path, sampling: dict[str, Any], expected: dict[str, Any]) -> None:
    model = TinyLlama()
    model.metadata |= {f"general.sampling.{key}": value for key, value in sampling.items()}
    gguf = model.write(tmp_path / "model.gguf")
    folder = export_folder(str(gguf), tmp_path / "folder", home=home)
    assert_same_model(gguf, folder)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": None, **expected}
    assert isinstance(found.get("top_k", 1), int)


def test_in_shards(tmp_path: Path, home: Path) -> None:
    gguf = str(TinyLlama().write(tmp_path / "model.gguf"))
    whole = export_folder(gguf, tmp_path / "whole", home=home)
    parts = export_folder(gguf, tmp_path / "parts", home=home, shard_bytes=40_000)
    index = json.loads((parts / INDEX).read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert not (whole / INDEX).exists() and not (parts / WHOLE).exists()
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    with FolderCheckpoint(whole) as first, FolderCheckpoint(parts) as second:
        assert first.tensors.keys() == second.tensors.keys() == index["weight_map"].keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in first.tensors.values())
        for name in first.tensors:
            np.testing.assert_array_equal(values_of(first, name), values_of(second, name))


def test_a_place_that_is_taken(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    target = tmp_path / "deep" / "folder"
    export_folder(str(gguf), target, home=home)
    (target / "mine").touch()
    with pytest.raises(ConfigError, match="exists already: name another folder, or replace it with --force"):
        export_folder(str(gguf), target, home=home)
    assert export_folder(str(gguf), target, home=home, force=True, dtype="float32") == target
    assert not (target / "mine").exists()
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    for other in (home, gguf):
        with pytest.raises(ConfigError, match="is no model's folder, which is all that --force replaces"):
            export_folder(str(gguf), other, home=home, force=True)
    inside = TinyLlama().write(target / "model.gguf")
    with pytest.raises(ConfigError, match=r"lies in .* which would be replaced"):
        export_folder(str(inside), target, home=home, force=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    export_folder(str(gguf), link, home=home, force=True)
    assert link.is_symlink() and link.resolve() == target and not inside.exists()


def test_what_is_not_converted(tmp_path: Path, home: Path) -> None:
    folder = TinyFolder().write(tmp_path / "tiny")
    with pytest.raises(UnsupportedModelError, match=f"needs no conversion: it is a Hugging Face folder, {folder}"):
        export_folder(str(folder), tmp_path / "out", home=home)
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    packed = load_model(str(gguf), home=home).path
    with pytest.raises(UnsupportedModelError, match="is packed for Seraph: name the checkpoint"):
        export_folder(str(packed), tmp_path / "out", home=home)
    with pytest.raises(ConfigError, match="dtype must be one of bfloat16, float16, float32, got 'int8'"):
        export_folder(str(gguf), tmp_path / "out", home=home, dtype="int8")
    other = TinyLlama()
    other.metadata["general.architecture"] = "mamba"
    with pytest.raises(
        UnsupportedModelError, match=r"general\.architecture must be one of .*, the checkpoint has 'mamba'"
    ):
        export_folder(str(other.write(tmp_path / "other.gguf")), tmp_path / "out", home=home)
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_configuration_describes(tmp_path: Path, home: Path) -> None:
    """Queries scaled by what is no whole number."""
    folder = tiny_folder("gemma2", **{**SIZES, "layers": 46, "hidden": 160, "heads": 6, "head_dim": 16})
    gguf = tiny_gguf("gemma2", folder, "F32", head_dim=16).write(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match=r"gemma2: config\.json cannot say all that this checkpoint says"):
        export_folder(str(gguf), tmp_path / "folder", home=home)


@pytest.mark.parametrize(
    ("value", "dtype", "error", "message"),
    [
        (
            70000.0,
            "float16",
            ConfigError,
            r"float16 holds values of at most 65504, and model\.\S+ has 70000: take anot",
        ),
        (3.4e38, "bfloat16", ConfigError, "bfloat16 holds values of at most"),
        (np.nan, "float32", FormatError, "holds a value that is not finite"),
        (np.inf, "bfloat16", FormatError, "holds a value that is not finite"),
    ],
)
@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "output_norm.weight"])
def test_values_that_a_dtype_cannot_hold(
    tmp_path: Path, home: Path, name: str, value: float, dtype: str, error: type[Exception], message: str
) -> None:
    model = TinyLlama(quant="F32")
    model.tensors[name].reshape(-1)[-1] = value
    gguf = model.write(tmp_path / "model.gguf")
    with pytest.raises(error, match=message):
        export_folder(str(gguf), tmp_path / "out" / "folder", dtype=dtype, home=home)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"no space left in .*: converting model needs 0\.\d MB, 0\.0 MB are free"):
        export_folder(str(gguf), tmp_path / "out" / "folder", home=home, free=lambda _: 1000)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    with pytest.raises(SourceError, match=r"converting model in .* failed: File exists"):
        export_folder(str(gguf), gguf / "folder", home=home)


class _Interrupted(NoProgress):
    def advance(self, num_bytes: int) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    target = tmp_path / "out" / "folder"
    for force in (False, True):
        before = {path.name: path.read_bytes() for path in target.glob("*")}
        with pytest.raises(KeyboardInterrupt):
            export_folder(str(gguf), target, home=home, progress=_Interrupted(), force=force, dtype="float32")
        assert {path.name: path.read_bytes() for path in target.glob("*")} == before
        assert [path.name for path in target.parent.iterdir()] == (["folder"] if before else [])
        export_folder(str(gguf), target, home=home, force=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from engine.weights import export_folder
from engine.weights.progress import NoProgress

class Killed(NoProgress):
    def advance(self, num_bytes):
        os.kill(os.getpid(), signal.SIGKILL)

export_folder(sys.argv[1], Path(sys.argv[2]), home=Path(sys.argv[3]), progress=Killed())
"""


def test_what_a_killed_run_leaves_is_cleared_away(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    target = tmp_path / "out" / "folder"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(gguf), str(target), str(home)], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = target.parent.iterdir()
    assert left.suffix == ".tmp"
    mine = target.with_name("folder.notes.tmp")
    mine.mkdir()
    assert_same_model(gguf, export_folder(str(gguf), target, home=home))
    assert sorted(path.name for path in target.parent.iterdir()) == ["folder", mine.name]


def test_a_folder_goes_by_its_own_name(tmp_path: Path, home: Path) -> None:
    gguf = TinyLlama().write(tmp_path / "model.gguf")
    assert model_id(str(export_folder(str(gguf), tmp_path / "made", home=home))) == "made"
