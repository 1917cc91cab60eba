"""The families that we load: how each is named in a GGUF file and in a Hugging Face folder, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.errors import UnsupportedModelError
from engine.models import llama
from engine.models.blueprint import Blueprint, Description
from engine.models.keys import shown

Reader = Callable[[Description], Blueprint]
"""Raises UnsupportedModelError for whatever would make the answer differ from the checkpoint's own."""

GGUF_FAMILIES: Mapping[str, Reader] = {"llama": llama.from_gguf}
"""By `general.architecture`."""

HUGGINGFACE_FAMILIES: Mapping[str, Reader] = {"llama": llama.from_llama_config, "mistral": llama.from_mistral_config}
"""By config.json's `model_type`."""


def read_gguf(description: Description) -> Blueprint:
    """The blueprint of a GGUF file. Raises UnsupportedModelError for a family that we do not load."""
    return _reader(GGUF_FAMILIES, "general.architecture", description)(description)


def read_huggingface(description: Description) -> Blueprint:
    """The blueprint of a Hugging Face folder. Raises UnsupportedModelError for a family that we do not load."""
    return _reader(HUGGINGFACE_FAMILIES, "model_type", description)(description)


def _reader(families: Mapping[str, Reader], key: str, description: Description) -> Reader:
    name = description.config.get(key)
    reader = families.get(name) if isinstance(name, str) else None
    if reader is None:
        known = ", ".join(sorted(families))
        raise UnsupportedModelError(f"{key} must be one of {known}, the checkpoint has {shown(name)}.")
    return reader
