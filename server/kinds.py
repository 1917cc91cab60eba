"""What a served model is for: which routes take it, and what the others say."""

from __future__ import annotations

import enum

from engine.errors import RequestError
from engine.models.spec import DecoderSpec, ModelInfo


class Kind(enum.StrEnum):
    """What a model does."""

    GENERATE = "generate"  # a decoder: chat, completions
    EMBED = "embed"  # an encoder


NOUNS = {Kind.GENERATE: "a language model", Kind.EMBED: "an embedding model"}


def kind_of(info: ModelInfo) -> Kind:
    """What a checkpoint is for."""
    return Kind.GENERATE if isinstance(info.spec, DecoderSpec) else Kind.EMBED


def need_kind(name: str, kind: Kind, wanted: Kind, what: str) -> None:
    """Raises RequestError unless a model is of the kind that `what` needs."""
    if kind is not wanted:
        raise RequestError(
            f"The model {name!r} does not support {what}: it is {NOUNS[kind]}.",
            param="model",
            code="model_not_supported",
        )
