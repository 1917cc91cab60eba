"""The families that we load: how each is named in a GGUF file and in a Hugging Face folder, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from engine.errors import UnsupportedModelError
from engine.models import bert, decoder, gemma, llama, phi, qwen, rope
from engine.models.blueprint import Blueprint, Description
from engine.models.keys import Keys, shown
from engine.models.spec import DecoderSpec

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


Writer = Callable[[DecoderSpec], dict[str, object]]
"""What config.json says of a family beside the sizes and the rope, by transformers' name of its class."""

WRITERS: Mapping[str, Writer] = {
    "llama": llama.to_config,
    "qwen2": qwen.to_config,
    "qwen3": qwen.to_config,
    "qwen3moe": qwen.to_config,
    "gemma2": gemma.to_config,
    "gemma3": gemma.to_config,
    "phi3": phi.to_config,
}
"""By `DecoderSpec.family`, which is `general.architecture` too."""


def read_gguf(description: Description) -> Blueprint[Any]:
    """The blueprint of a GGUF file. Raises UnsupportedModelError for a family that we do not load."""
    return _reader(GGUF_FAMILIES, "general.architecture", description)(description)


def read_huggingface(description: Description) -> Blueprint[Any]:
    """The blueprint of a Hugging Face folder. Raises UnsupportedModelError for a family that we do not load."""
    return _reader(HUGGINGFACE_FAMILIES, "model_type", description)(description)


def as_huggingface(description: Description) -> tuple[dict[str, object], Blueprint[DecoderSpec]]:
    """The model of a GGUF file as a Hugging Face folder: its config.json, and the blueprint by which that folder's
    tensors are read. So whatever a family's file says of a folder's tensors is said once, for reading them.

    Raises UnsupportedModelError for a family that is not written, and for a model that would be read back as another.
    """
    spec: DecoderSpec = read_gguf(description).spec
    writer = WRITERS.get(spec.family)
    if writer is None:
        raise UnsupportedModelError(
            f"{spec.family} cannot be written as a Hugging Face folder, only {', '.join(WRITERS)} can."
        )
    keys = Keys(description.config, prefix=f"{spec.family}.")
    config = {**writer(spec), **decoder.to_config(spec), **rope.to_config(spec.rope, keys, spec.max_position)}
    names = [decoder.HUGGINGFACE_NAMES[name] for name in ("embed", *(() if spec.tie_embeddings else ("head",)))]
    # Only these are looked up to make a blueprint, which then names all.
    shapes = {**description.shapes, **dict.fromkeys(names, (spec.vocab_size, spec.hidden_size))}
    there: Blueprint[DecoderSpec] = read_huggingface(replace(description, config=config, shapes=shapes))
    again = there.spec
    same_ropes = len(again.ropes()) == len(spec.ropes()) and all(map(rope.alike, again.ropes(), spec.ropes()))
    if replace(again, rope=spec.rope, local_rope=spec.local_rope) != spec or not same_ropes:
        raise UnsupportedModelError(
            f"{spec.family}: config.json cannot say all that this checkpoint says of the model."
        )
    return config, there


def _reader(families: Mapping[str, Reader], key: str, description: Description) -> Reader:
    name = description.config.get(key)
    reader = families.get(name) if isinstance(name, str) else None
    if reader is None:
        known = ", ".join(sorted(families))
        raise UnsupportedModelError(f"{key} must be one of {known}, the checkpoint has {shown(name)}.")
    return reader
