"""What a served model is for: which routes take it, and what the others say."""

from __future__ import annotations

import enum
from typing import Any

from engine.errors import RequestError
from engine.models.spec import DecoderSpec, ModelInfo, OpaqueSpec


class Kind(enum.StrEnum):
    """What a model does."""

    GENERATE = "generate"  # a decoder: chat, completions
    EMBED = "embed"  # an encoder: embeddings
    SCORE = "score"  # an encoder with a classifier: scores, reranking


NOUNS = {
    Kind.GENERATE: "a language model",
    Kind.EMBED: "an embedding model",
    Kind.SCORE: "a cross-encoder, for scores",
}


def kind_of(info: ModelInfo[Any]) -> Kind:
    """What a checkpoint is for."""
    if isinstance(info.spec, DecoderSpec | OpaqueSpec):
        return Kind.GENERATE
    return Kind.SCORE if info.spec.num_labels else Kind.EMBED


def need_kind(name: str, kind: Kind, wanted: Kind, what: str) -> None:
    """Raises RequestError unless a model is of the kind that `what` needs."""
    if kind is not wanted:
        raise RequestError(
            f"The model {name!r} does not support {what}: it is {NOUNS[kind]}.",
            param="model",
            code="model_not_supported",
        )
