"""What a family's file is given of a checkpoint, and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from engine.models.recipe import Recipe
from engine.models.spec import Spec


@dataclass(frozen=True, slots=True)
class Description:
    """A checkpoint as a family's file sees it: its configuration and its tensors' shapes. Weights stay on disk."""

    config: Mapping[str, object]  # GGUF metadata, or config.json
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors: (outputs, inputs) or (length,)
    vector: Callable[[str], NDArray[np.float32]]  # reads one of the small tensors, float32 [length]
    same: Callable[[str, str], bool]  # reads two tensors: whether they are stored with the same shape, type and bytes
    modules: Callable[[], Modules | None] = lambda: None  # what becomes of an encoder's rows; None: it does not say


@dataclass(frozen=True, slots=True)
class Modules:
    """What sentence-transformers' files beside a checkpoint say of how its rows become one vector."""

    pooling: str  # as `EncoderSpec.pooling`
    normalize: bool
    max_length: int | None = None  # tokens of a text, where that is less than there are positions


@dataclass(frozen=True, slots=True)
class Blueprint(Generic[Spec]):
    """A model, and how each of its tensors is put together."""

    spec: Spec
    recipes: tuple[Recipe, ...]
    ignored: frozenset[str] = frozenset()
    """Tensors of the checkpoint that no recipe needs: already part of the spec, or without influence."""

    def __post_init__(self) -> None:
        assert {recipe.name: recipe.shape for recipe in self.recipes} == self.spec.tensor_shapes()
