"""Weights as a process holds them: where they are read from, how large they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.config import HUGE_PAGES_SHARE, gives_huge_pages
from engine.kernels.layout import PackedTensor
from engine.models.spec import DecoderSpec, EncoderSpec
from engine.request import WeightsInfo

if TYPE_CHECKING:
    from engine.weights import PackedModel

HUGE_PAGE = 2 << 20
"""Bytes, of the smallest there are on x86-64: less than one is not worth a copy."""


def resident_weights(huge_pages: str, model: PackedModel[Any], memory: int) -> Mapping[str, PackedTensor]:
    """The weights where they are to be read from: the mapped file, or a copy in huge pages.

    The kernels read the copy some 7 % faster: of small pages there are more than a core's tables of addresses hold.
    But every process has its own. `memory` is the bytes this process may use.
    """
    nbytes = sum(tensor.data.nbytes for tensor in model.weights.values())
    fits = HUGE_PAGE <= nbytes <= HUGE_PAGES_SHARE * memory
    if huge_pages == "on" or (huge_pages == "auto" and fits and gives_huge_pages()):
        return model.copied()
    return model.weights


def num_parameters(spec: DecoderSpec | EncoderSpec) -> int:
    """Numbers in the checkpoint; tied embeddings count once."""
    return sum(math.prod(shape) for shape in spec.tensor_shapes().values())


def describe_weights(weights: Mapping[str, PackedTensor]) -> WeightsInfo:
    """How large packed weights are, and in how many bits most of them lie."""
    nbytes: dict[int, int] = {}
    for tensor in weights.values():
        bits = 32 if tensor.format is None else tensor.format.bits
        nbytes[bits] = nbytes.get(bits, 0) + tensor.data.nbytes
    return WeightsInfo(nbytes=sum(nbytes.values()), bits=max(nbytes, key=nbytes.__getitem__, default=0))
