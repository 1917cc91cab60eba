from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import FormatError, ModelError, UnsupportedModelError
from engine.models.spec import EncoderSpec
from engine.weights import load_encoder
from tests.tiny_encoders import ENCODERS, seed_of, write_modules

Tensors = dict[str, np.ndarray[Any, Any]]


def write(
    folder: Path,
    name: str = "minilm",
    *,
    config: Mapping[str, object] | None = None,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> Path:
    """ENCODERS[name] with other keys (None: left out) and tensors."""
    path = ENCODERS[name].write(folder / "model", seed_of(name))
    values = json.loads((path / "config.json").read_text()) | (config or {})
    kept = {key: value for key, value in values.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors")
    return path


def spec_of(folder: Path) -> EncoderSpec:
    model = load_encoder(str(folder), home=folder / "home")
    spec = model.info.spec
    model.close()
    return spec


@pytest.mark.parametrize(
    "name, pooling, normalize, labels, types, activation",
    [
        ("minilm", "mean", True, 0, 2, "gelu"),
        ("bge", "cls", True, 0, 2, "gelu"),
        ("e5", "mean", True, 0, 1, "gelu"),
        ("bare", "mean", False, 0, 2, "gelu_tanh"),
        ("cross", "mean", False, 1, 2, "gelu"),
        ("classes", "mean", False, 3, 1, "gelu"),
    ],
)
def test_every_form_is_read(
    tmp_path: Path, name: str, pooling: str, normalize: bool, labels: int, types: int, activation: str
) -> None:
    spec = spec_of(write(tmp_path, name))
    found = (spec.pooling, spec.normalize, spec.num_labels, spec.num_types, spec.activation, spec.max_position)
    assert found == (pooling, normalize, labels, types, activation, 100)
    assert spec.family == ENCODERS[name].model_type


def test_what_a_configuration_leaves_out_is_bert_base(tmp_path: Path) -> None:
    spec = spec_of(write(tmp_path, config={"hidden_act": None, "layer_norm_eps": None, "type_vocab_size": None}))
    assert (spec.activation, spec.norm_eps, spec.num_types) == ("gelu", 1e-12, 2)


def test_older_names_and_what_training_left_are_no_matter(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        made = {}
        for name, values in tensors.items():
            ending = next((key for key in old if name.endswith(key)), "")
            made[name.removesuffix(ending) + old.get(ending, "")] = values
        made["embeddings.position_ids"] = np.arange(100)[None]
        made["cls.predictions.bias"] = np.zeros(128, np.float32)
        return made

    plain, older = write(tmp_path / "plain"), write(tmp_path / "older", change=change)
    models = [load_encoder(str(path), home=tmp_path / "home") for path in (plain, older)]
    for name in models[0].weights:
        assert np.array_equal(models[0].weights[name].data, models[1].weights[name].data)


@pytest.mark.parametrize(
    "name, config, said",
    [
        ("minilm", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ("minilm", {"is_decoder": True}, "is_decoder must be False"),
        ("minilm", {"add_cross_attention": True}, "add_cross_attention must be False"),
        ("minilm", {"hidden_act": "relu"}, "hidden_act must be one of gelu, .*got 'relu'"),
        ("minilm", {"num_attention_heads": 7}, "hidden_size / num_heads must be a multiple of 16"),
        ("minilm", {"num_attention_heads": 0}, "num_heads must be at least 1"),
        ("minilm", {"num_hidden_layers": 40}, "num_hidden_layers must be one integer from 1 to 3"),
        ("minilm", {"hidden_size": 80}, "hidden_size must be a multiple of 32"),
        ("minilm", {"layer_norm_eps": 0}, "layer_norm_eps must be a positive number"),
        ("e5", {"max_position_embeddings": 2}, "max_position_embeddings must be one integer from 3"),
        ("e5", {"pad_token_id": -1}, "pad_token_id"),
    ],
)
def test_a_configuration_that_is_not_supported_is_named(
    tmp_path: Path, name: str, config: dict[str, object], said: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        spec_of(write(tmp_path, name, config=config))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: values for name, values in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "name, change, error, said",
    [
        (
            "minilm", without("embeddings.word_embeddings.weight"), UnsupportedModelError,
            "embeddings.word_embeddings.weight is missing",
        ),
        (
            "minilm", without("encoder.layer.1.output.dense.bias"), FormatError,
            r"encoder.layer.1.output.dense.bias \[96\] is missing",
        ),
        (
            "minilm", lambda t: t | {"encoder.layer.0.output.dense.weight": np.zeros((96, 64), np.float32)},
            FormatError, r"expected shape \[96, 160\], found \[96, 64\]",
        ),
        (
            "minilm", lambda t: t | {"extra.weight": np.zeros(3, np.float32)}, UnsupportedModelError,
            "tensors that are not supported: extra.weight",
        ),
        ("cross", without("bert.pooler.dense.weight"), UnsupportedModelError, "must be a matrix after a pooler"),
        (
            "cross", lambda t: t | {"classifier.weight": np.zeros(96, np.float32)}, UnsupportedModelError,
            r"classifier.weight \[96\] must be a matrix",
        ),
        ("classes", without("classifier.dense.bias"), FormatError, "classifier.dense.bias"),
        (
            "e5", lambda t: t | {"embeddings.position_embeddings.weight": np.zeros((100, 128), np.float32)},
            FormatError, r"expected shape \[102, 128\], found \[100, 128\]",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, name: str, change: Callable[[Tensors], Tensors], error: type[ModelError], said: str
) -> None:
    with pytest.raises(error, match=said):
        spec_of(write(tmp_path, name, change=change))


@pytest.mark.parametrize(
    "files, said",
    [
        ({"modules.json": "{"}, "modules.json: not JSON"),
        ({"modules.json": "{}"}, "must be a JSON array"),
        ({"modules.json": "[1]"}, "objects with a type and a path, found 1"),
        ({"modules.json": '[{"type": "a.Transformer", "path": ""}]'}, r"Normalize, found \['Transformer'\]"),
        (
            {"modules.json": '[{"type":"Transformer","path":""},{"type":"Pooling","path":"../x"}]'},
            "must lie in 1_Pooling, found '../x'",
        ),
        (
            {"modules.json": json.dumps([{"type": k, "path": ""} for k in ("Transformer", "Pooling", "Dense")])},
            "found .*Dense",
        ),
        ({"1_Pooling/config.json": '{"pooling_mode_max_tokens": true}'}, "mean or cls, found .*max_tokens"),
        ({"1_Pooling/config.json": "{}"}, r"mean or cls, found \[\]"),
        (
            {"1_Pooling/config.json": '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}'},
            "found .*cls.*mean",
        ),
        ({"1_Pooling/config.json": '{"pooling_mode": "lasttoken"}'}, "found .*lasttoken"),
        ({"sentence_bert_config.json": '{"max_seq_length": 0}'}, "max_seq_length must be one integer from 1"),
        ({"sentence_bert_config.json": "[]"}, "sentence_bert_config.json"),
    ],
)
def test_modules_that_are_not_supported_are_named(tmp_path: Path, files: dict[str, str], said: str) -> None:
    path = write(tmp_path)
    for name, text in files.items():
        (path / name).write_text(text)
    with pytest.raises(ModelError, match=said):
        spec_of(path)


@pytest.mark.parametrize("mode, pooling", [("mean", "mean"), ("cls", "cls")])
def test_pooling_has_a_newer_spelling(tmp_path: Path, mode: str, pooling: str) -> None:
    path = write(tmp_path)
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 96, "pooling_mode": mode}))
    assert spec_of(path).pooling == pooling


def test_a_change_of_the_modules_is_another_model(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert spec_of(path).pooling == "mean"
    write_modules(path, "cls", normalize=False)
    spec = spec_of(path)
    assert (spec.pooling, spec.normalize) == ("cls", False)
