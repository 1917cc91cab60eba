"""The families that we load: how each is named in a GGUF file and in a Hugging Face folder, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import UnsupportedModelError
from engine.models import bert, gemma, llama, phi, qwen
from engine.models.blueprint import Blueprint, Description
from engine.models.keys import shown

Reader = Callable[[Description], Blueprint[Any]]
"""Raises UnsupportedModelError for whatever would make the answer differ from the checkpoint's own."""

GGUF_FAMILIES: Mapping[str, Reader] = {
    "llama": llama.from_gguf,
    "qwen2": qwen.from_qwen2_gguf,
    "qwen3": qwen.from_qwen3_gguf,
    "qwen3moe": qwen.from_qwen3moe_gguf,
    "gemma2": gemma.from_gemma2_gguf,
    "gemma3": gemma.from_gemma3_gguf,
    "phi3": phi.from_gguf,
}
"""By `general.architecture`."""

HUGGINGFACE_FAMILIES: Mapping[str, Reader] = {
    "llama": llama.from_llama_config,
    "mistral": llama.from_mistral_config,
    "mixtral": llama.from_mixtral_config,
    "qwen2": qwen.from_qwen2_config,
    "qwen3": qwen.from_qwen3_config,
    "qwen3_moe": qwen.from_qwen3_moe_config,
    "gemma2": gemma.from_gemma2_config,
    "gemma3_text": gemma.from_gemma3_config,
    "phi3": phi.from_config,
    "bert": bert.from_bert_config,
    "roberta": bert.from_roberta_config,
    "xlm-roberta": bert.from_xlm_roberta_config,
}
"""By config.json's `model_type`."""


def read_gguf(description: Description) -> Blueprint[Any]:
    """The blueprint of a GGUF file. Raises UnsupportedModelError for a family that we do not load."""
    return _reader(GGUF_FAMILIES, "general.architecture", description)(description)


def read_huggingface(description: Description) -> Blueprint[Any]:
    """The blueprint of a Hugging Face folder. Raises UnsupportedModelError for a family that we do not load."""
    return _reader(HUGGINGFACE_FAMILIES, "model_type", description)(description)


def _reader(families: Mapping[str, Reader], key: str, description: Description) -> Reader:
    name = description.config.get(key)
    reader = families.get(name) if isinstance(name, str) else None
    if reader is None:
        known = ", ".join(sorted(families))
        raise UnsupportedModelError(f"{key} must be one of {known}, the checkpoint has {shown(name)}.")
    return reader
