"""Rope scaling: what each pair's frequency is divided by, so that a model reads further than it was first trained to.

A RopeSpec carries the factors themselves, [dim / 2]; how a checkpoint says them is settled here. Sources: transformers'
`modeling_rope_utils` for config.json, llama.cpp's reading of the `rope.` keys for GGUF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModelError
from engine.models.keys import Keys, shown
from engine.models.spec import RopeSpec

DEFAULT_THETA = 10000.0


def from_huggingface(config: Mapping[str, object], dim: int) -> RopeSpec:
    """The rope that a config.json describes, as transformers reads it.

    Version 5 writes everything into `rope_parameters`, earlier versions wrote `rope_theta` beside `rope_scaling`, whose
    type was once called `type`. `config` has the family's `max_position_embeddings` where the file has none.
    """
    keys = Keys(config)
    keys.neutral("partial_rotary_factor", 1.0)
    # Where a file has both, the older spelling counts: transformers moves it over the newer one.
    table = keys.table("rope_scaling") or keys.table("rope_parameters")
    rope = Keys(table)
    rope.neutral("partial_rotary_factor", 1.0)
    theta = rope.positive("rope_theta", default=keys.positive("rope_theta", default=DEFAULT_THETA))
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    match kind:
        case "default":
            factors: tuple[float, ...] = ()
        case "linear":
            factors = linear_factors(rope.positive("factor"), dim)
        case "llama3":
            context = rope.count("original_max_position_embeddings", keys.count("max_position_embeddings"), least=1)
            factors = llama3_factors(
                theta,
                dim,
                factor=rope.positive("factor"),
                low_freq_factor=rope.positive("low_freq_factor"),
                high_freq_factor=rope.positive("high_freq_factor"),
                original_context=keys.count("original_max_position_embeddings", default=context, least=1),
            )
        case _:
            raise UnsupportedModelError(
                f"rope scaling must be default, linear or llama3, the checkpoint has {shown(kind)}."
            )
    return RopeSpec(theta=theta, dim=dim, factors=factors)


def from_gguf(keys: Keys, dim: int, frequency_factors: NDArray[np.float32] | None) -> RopeSpec:
    """The rope that GGUF `keys` describe; `frequency_factors` is the tensor rope_freqs.weight, [dim / 2]."""
    theta = keys.positive("rope.freq_base", default=DEFAULT_THETA)
    kind = keys.text("rope.scaling.type", default="linear")  # the only one there was before it had a name
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"rope scaling must be none or linear, the checkpoint has {shown(kind)}.")
    key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"  # the old name
    stored = keys.get(key)
    unscaled = kind == "none" or stored is None or (isinstance(stored, (int, float)) and stored == 0)
    factor = 1.0 if unscaled else keys.positive(key)
    if frequency_factors is None:
        return RopeSpec(theta=theta, dim=dim, factors=linear_factors(factor, dim))
    if factor != 1.0:
        raise UnsupportedModelError(
            f"rope scaling must be given once, the checkpoint has {keys.name(key)} {factor:g} and rope_freqs.weight."
        )
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
            f"low_freq_factor must be below high_freq_factor {high_freq_factor:g}, got {low_freq_factor:g}."
        )
    turns = original_context * RopeSpec(theta=theta, dim=dim).frequencies() / (2 * math.pi)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    factors: list[float] = (1.0 / (kept + (1.0 - kept) / factor)).tolist()
    return tuple(factors)
