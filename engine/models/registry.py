"""The families that we load, by the name a GGUF file gives its architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from engine.errors import UnsupportedModelError
from engine.models import llama
from engine.models.recipe import Recipe
from engine.models.spec import DecoderSpec

Metadata = Mapping[str, object]
Shapes = Mapping[str, tuple[int, ...]]


class Family(Protocol):
    """What a family's module offers."""

    def read_spec(self, metadata: Metadata, shapes: Shapes) -> DecoderSpec:
        """The decoder that GGUF `metadata` and the tensors' `shapes` ((outputs, inputs) or (length,)) describe.

        Raises UnsupportedModelError for whatever would make the answer differ from the checkpoint's own.
        """
        ...

    def recipes(self, spec: DecoderSpec) -> list[Recipe]:
        """How each tensor of `spec.tensor_shapes()` is made from the checkpoint's, in that order."""
        ...


FAMILIES: Mapping[str, Family] = {"llama": llama}


def family_of(metadata: Metadata) -> Family:
    """The family of a checkpoint; UnsupportedModelError, listing what is supported, for one we do not know."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"general.architecture must be one of {', '.join(sorted(FAMILIES))}, the checkpoint has {architecture!r}."
        )
    return FAMILIES[architecture]
