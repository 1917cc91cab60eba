from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import FormatError, SourceError, UnsupportedModelError
from engine.weights import checkpoint as checkpoint_module
from engine.weights.checkpoint import open_checkpoint, read_vector, stored_alike
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder


def test_a_path_is_a_folder_or_a_gguf_file(tmp_path: Path) -> None:
    folder = TinyFolder().write(tmp_path / "tiny")
    file = TinyLlama().write(tmp_path / "tiny.gguf")
    for path, name in ((folder, "safetensors"), (file, "GGUF")):
        with open_checkpoint(path) as checkpoint:
            assert (checkpoint.format_name, checkpoint.path) == (name, path)
            assert len(checkpoint.sha256()) == 64
            assert checkpoint.blueprint().spec.num_layers == 2
            assert checkpoint.text().vocab_size == 307
            assert checkpoint.generation_defaults() == {}
        with pytest.raises(ValueError, match="closed file"):
            checkpoint.read_rows(next(iter(checkpoint.tensors)), 0, 1)
        checkpoint.close()  # idempotent
    with pytest.raises(SourceError, match=r"none\.gguf: No such file"):
        open_checkpoint(tmp_path / "none.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"cannot read .*config\.json"):
        open_checkpoint(tmp_path / "empty")


def test_the_sampling_that_a_gguf_file_wants(tmp_path: Path) -> None:
    model = TinyLlama()
    model.metadata |= {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    with open_checkpoint(model.write(tmp_path / "m.gguf")) as checkpoint:
        assert checkpoint.generation_defaults() == {"temperature": 0.5, "top_k": 20}


def test_a_gguf_checkpoint_in_several_files(tmp_path: Path) -> None:
    model = TinyLlama()
    model.metadata["split.count"] = 1
    with open_checkpoint(model.write(tmp_path / "one.gguf")) as checkpoint:
        checkpoint.blueprint()
    model.metadata["split.count"] = 3
    with (
        open_checkpoint(model.write(tmp_path / "three.gguf")) as checkpoint,
        pytest.raises(UnsupportedModelError, match=r"split over several files are not supported \(split.count 3\)"),
    ):
        checkpoint.blueprint()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_vectors(tmp_path: Path, kind: str) -> None:
    model = TinyFolder(dtype=kind)
    norm = "model.norm.weight"
    model.tensors[norm] = np.arange(64, dtype=np.float32)  # exact in each type
    model.tensors["model.layers.0.input_layernorm.weight"][5] = np.nan
    with open_checkpoint(model.write(tmp_path / "m")) as checkpoint:
        np.testing.assert_array_equal(read_vector(checkpoint, norm), model.tensors[norm])
        with pytest.raises(FormatError, match=r"input_layernorm.weight holds a value that is not finite"):
            read_vector(checkpoint, "model.layers.0.input_layernorm.weight")
        with pytest.raises(
            FormatError, match=rf"embed_tokens.weight: expected a vector of .*, found {kind} \[307, 64\]"
        ):
            read_vector(checkpoint, "model.embed_tokens.weight")


def test_a_vector_of_another_type(tmp_path: Path) -> None:
    model = TinyFolder()
    model.types["model.norm.weight"] = "I32"
    with (
        open_checkpoint(model.write(tmp_path / "m")) as checkpoint,
        pytest.raises(FormatError, match=r"model.norm.weight: expected a vector of F32, F16, BF16, found I32 \[64\]"),
    ):
        read_vector(checkpoint, "model.norm.weight")


@pytest.mark.parametrize("compared_bytes", [1, 1000, 1 << 20])
def test_tensors_that_are_stored_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compared_bytes: int) -> None:
    monkeypatch.setattr(checkpoint_module, "COMPARED_BYTES", compared_bytes)
    model = TinyFolder()
    embed = model.tensors["model.embed_tokens.weight"]
    model.tensors |= {"copy": embed.copy(), "wide": embed.copy(), "flat": embed.reshape(64, -1)}
    model.types |= {"copy": "BF16", "wide": "F32", "flat": "BF16"}
    for name, row in (("first", 0), ("last", -1)):
        model.tensors[name], model.types[name] = embed.copy(), "BF16"
        model.tensors[name][row, row] += 1
    model.tensors |= {"none": np.empty((0, 4), np.float32), "nothing": np.empty((0, 4), np.float32)}
    model.types |= {"none": "F32", "nothing": "F32"}
    with open_checkpoint(model.write(tmp_path / "m", shards=2)) as checkpoint:
        alike = {name: stored_alike(checkpoint, "model.embed_tokens.weight", name) for name in model.tensors}
        assert {name for name, same in alike.items() if same} == {"model.embed_tokens.weight", "copy"}
        assert stored_alike(checkpoint, "none", "nothing")
