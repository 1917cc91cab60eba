"""Rope scaling: what each pair's frequency is divided by, so that a model reads further than it was first trained to.

A RopeSpec carries the factors themselves, [dim / 2]; how a checkpoint says them is settled here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModelError
from engine.models.keys import Keys
from engine.models.spec import RopeSpec

_PLAIN = ("default", "none")


def from_huggingface(config: Mapping[str, object], dim: int) -> RopeSpec:
    """The rope that a config.json describes: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    keys = Keys(config)
    parameters = keys.table("rope_parameters") or {}
    scaling = parameters or keys.table("rope_scaling") or {}
    theta = Keys(parameters).positive("rope_theta", default=keys.positive("rope_theta", default=10000.0))
    rope = Keys(scaling)
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    match kind:
        case "default":
            factors: tuple[float, ...] = ()
        case "linear":
            factors = linear_factors(rope.positive("factor"), dim)
        case "llama3":
            factors = llama3_factors(
                theta,
                dim,
                factor=rope.positive("factor"),
                low_freq_factor=rope.positive("low_freq_factor"),
                high_freq_factor=rope.positive("high_freq_factor"),
                original_context=rope.count("original_max_position_embeddings"),
            )
        case _:
            raise UnsupportedModelError(f"rope scaling must be default, linear or llama3, the checkpoint has {kind!r}.")
    return RopeSpec(theta=theta, dim=dim, factors=factors)


def from_gguf(keys: Keys, dim: int, frequency_factors: NDArray[np.float32] | None) -> RopeSpec:
    """The rope that GGUF `keys` describe; `frequency_factors` is the tensor rope_freqs.weight, [dim / 2]."""
    theta = keys.positive("rope.freq_base", default=10000.0)
    kind = keys.text("rope.scaling.type", default="none")
    # The key before there were types; converters wrote 0 or 1 for "none".
    old = keys.get("rope.scale_linear")
    factor = keys.positive("rope.scale_linear", default=1.0) if old else 1.0
    if kind == "linear":
        factor = keys.positive("rope.scaling.factor", default=factor)
    elif kind not in _PLAIN:
        raise UnsupportedModelError(f"rope scaling must be none or linear, the checkpoint has {kind!r}.")
    elif keys.get("rope.scaling.factor") not in (None, 0.0, 1.0):
        raise keys.error("rope.scaling.factor", "0.0 or 1.0 without a rope.scaling.type")
    if frequency_factors is None:
        return RopeSpec(theta=theta, dim=dim, factors=linear_factors(factor, dim))
    if factor != 1.0:
        raise UnsupportedModelError("rope scaling is given twice: linear, and by the tensor rope_freqs.weight.")
    return RopeSpec(theta=theta, dim=dim, factors=tuple(frequency_factors.tolist()))


def linear_factors(factor: float, dim: int) -> tuple[float, ...]:
    """Position interpolation (Chen et al., 2023): every position counts 1 / factor."""
    return () if factor == 1.0 else (factor,) * (dim // 2)


def llama3_factors(
    theta: float, dim: int, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_context: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling: pairs that turn often within the original context stay, those that hardly turn are slowed
    down by `factor`, and between `low_freq_factor` and `high_freq_factor` turns the two are mixed."""
    if not low_freq_factor < high_freq_factor:
        raise UnsupportedModelError(
            f"low_freq_factor must be below high_freq_factor {high_freq_factor:g}, the checkpoint has "
            f"{low_freq_factor:g}."
        )
    turns = original_context * RopeSpec(theta=theta, dim=dim).frequencies() / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    factors: list[float] = (1.0 / (kept + (1.0 - kept) / factor)).tolist()
    return tuple(factors)
