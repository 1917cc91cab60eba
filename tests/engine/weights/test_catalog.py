"""The catalogue: what it says of sampling reaches whoever loads a model by its short name, and its models are there."""

from __future__ import annotations

import msgspec
import pytest

from engine.request import SamplingParams
from engine.weights import CatalogEntry, PackedModel, catalog, load_model


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


@pytest.mark.parametrize(
    "changes", [{"folder": "f"}, {"file": ""}, {"file": "", "folder": "f"}, {"file": "f", "folder": "f", "files": []}]
)
def test_an_entry_is_a_file_or_a_folder(changes: dict[str, object]) -> None:
    values = msgspec.to_builtins(catalog()[0]) | changes
    with pytest.raises(msgspec.ValidationError, match="expected either file, or folder and files"):
        msgspec.convert(values, CatalogEntry)
