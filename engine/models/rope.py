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

ROUNDED = 1e-5
"""How far factors that are the same may lie apart, in parts of them: converters compute them in float32."""

_LLAMA3_TURNS: Mapping[str, float] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192
"""What every Llama from 3.1 on is scaled with; only the factor differs. A GGUF file has none of it, only the result."""


def from_huggingface(config: Mapping[str, object], head_dim: int, *, partial: bool = False) -> RopeSpec:
    """The rope that a config.json describes, as transformers reads it. `partial`: of a family that may turn a part of
    each head alone.

    Version 5 writes everything into `rope_parameters`, earlier versions wrote `rope_theta` beside `rope_scaling`, whose
    type was once called `type`. `config` has the family's `max_position_embeddings` where the file has none.
    """
    keys = Keys(config)
    # Where a file has both, the older spelling counts: transformers moves it over the newer one.
    table = keys.table("rope_scaling") or keys.table("rope_parameters")
    rope = Keys(table)
    share = 1.0
    if partial:
        share = rope.positive("partial_rotary_factor", default=keys.positive("partial_rotary_factor", default=1.0))
    else:
        keys.neutral("partial_rotary_factor", 1.0)
        rope.neutral("partial_rotary_factor", 1.0)
    if share > 1:
        raise UnsupportedModelError(f"partial_rotary_factor must be at most 1, got {share:g}.")
    dim = int(head_dim * share)
    theta = rope.positive("rope_theta", default=keys.positive("rope_theta", default=DEFAULT_THETA))
    kind = rope.text("rope_type", default=rope.text("type", default="default"))
    context = keys.count("max_position_embeddings")
    match kind:
        case "default":
            return RopeSpec(theta=theta, dim=dim)
        case "linear":
            return RopeSpec(theta=theta, dim=dim, factors=linear_factors(rope.positive("factor"), dim))
        case "llama3":
            factors = llama3_factors(
                theta,
                dim,
                factor=rope.positive("factor"),
                low_freq_factor=rope.positive("low_freq_factor"),
                high_freq_factor=rope.positive("high_freq_factor"),
                original_context=_original_context(keys, rope, context),
            )
            return RopeSpec(theta=theta, dim=dim, factors=factors)
        case "yarn":
            return _yarn_from_huggingface(keys, rope, theta, dim, _original_context(keys, rope, context))
        case "longrope":
            original = _original_context(keys, rope, context)
            factor = rope.positive("factor", default=context / original)
            return RopeSpec(
                theta=theta,
                dim=dim,
                factors=_factor_list(rope, "short_factor", dim),
                long_factors=_factor_list(rope, "long_factor", dim),
                original_context=original,
                attention_factor=rope.positive("attention_factor", default=longrope_attention(factor, original)),
            )
        case _:
            raise UnsupportedModelError(
                f"rope scaling must be default, linear, llama3, yarn or longrope, the checkpoint has {shown(kind)}."
            )


def _original_context(keys: Keys, rope: Keys, context: int) -> int:
    """Positions of the first training: beside the scaling, or, where an older file has it, beside everything else."""
    key = "original_max_position_embeddings"
    return keys.count(key, default=rope.count(key, context, least=1), least=1)


def _yarn_from_huggingface(keys: Keys, rope: Keys, theta: float, dim: int, original_context: int) -> RopeSpec:
    factor = rope.positive("factor")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dim:
        attention = yarn_attention(factor, rope.positive("mscale")) / yarn_attention(
            factor, rope.positive("mscale_all_dim")
        )
    else:
        attention = yarn_attention(factor)
    return RopeSpec(
        theta=theta,
        dim=dim,
        factors=yarn_factors(
            theta,
            dim,
            factor=factor,
            original_context=original_context,
            beta_fast=rope.positive("beta_fast", default=32.0),
            beta_slow=rope.positive("beta_slow", default=1.0),
            whole=rope.flag("truncate", default=True),
        ),
        attention_factor=rope.positive("attention_factor", default=attention),
    )


def _factor_list(rope: Keys, key: str, dim: int) -> tuple[float, ...]:
    values = rope.get(key)
    usable = isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf for value in values
    )
    if not isinstance(values, list) or not usable or len(values) != dim // 2:
        raise rope.error(key, f"{dim // 2} positive numbers")
    return tuple(map(float, values))


def from_gguf(
    keys: Keys, dim: int, frequency_factors: NDArray[np.float32] | None, *, default_theta: float = DEFAULT_THETA
) -> RopeSpec:
    """The rope that GGUF `keys` describe; `frequency_factors` is the tensor rope_freqs.weight, [dim / 2]."""
    theta = keys.positive("rope.freq_base", default=default_theta)
    kind = keys.text("rope.scaling.type", default="linear")  # the only one there was before it had a name
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"rope scaling must be none, linear or yarn, the checkpoint has {shown(kind)}.")
    key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"  # the old name
    stored = keys.get(key)
    unscaled = kind == "none" or stored is None or (isinstance(stored, (int, float)) and stored == 0)
    factor = 1.0 if unscaled else keys.positive(key)
    if kind == "yarn":
        if frequency_factors is not None:
            raise UnsupportedModelError(
                "rope scaling must be given once, the checkpoint has yarn and rope_freqs.weight."
            )
        original = keys.count("rope.scaling.original_context_length", keys.count("context_length"), least=1)
        return RopeSpec(
            theta=theta,
            dim=dim,
            factors=yarn_factors(
                theta,
                dim,
                factor=factor,
                original_context=original,
                beta_fast=keys.positive("rope.scaling.yarn_beta_fast", default=32.0),
                beta_slow=keys.positive("rope.scaling.yarn_beta_slow", default=1.0),
            ),
            attention_factor=keys.positive("rope.scaling.attn_factor", default=1.0) * yarn_attention(factor),
        )
    keys.neutral("rope.scaling.attn_factor", 1.0)
    if frequency_factors is None:
        return RopeSpec(theta=theta, dim=dim, factors=linear_factors(factor, dim))
    if factor != 1.0:
        raise UnsupportedModelError(
            f"rope scaling must be given once, the checkpoint has {keys.name(key)} {factor:g} and rope_freqs.weight."
        )
    return RopeSpec(theta=theta, dim=dim, factors=tuple(frequency_factors.tolist()))


def long_from_gguf(keys: Keys, dim: int, short: NDArray[np.float32], long: NDArray[np.float32]) -> RopeSpec:
    """LongRoPE (Ding et al., 2024) as GGUF stores it: two tensors of factors, and what the first training had."""
    kind = keys.text("rope.scaling.type", default="longrope")
    if kind not in ("none", "longrope"):
        raise UnsupportedModelError(
            f"rope scaling must be longrope beside its factors, the checkpoint has {shown(kind)}."
        )
    return RopeSpec(
        theta=keys.positive("rope.freq_base", default=DEFAULT_THETA),
        dim=dim,
        factors=tuple(short.tolist()),
        long_factors=tuple(long.tolist()),
        original_context=keys.count("rope.scaling.original_context_length", keys.count("context_length"), least=1),
        attention_factor=keys.positive("rope.scaling.attn_factor", default=1.0),
    )


def to_config(rope: RopeSpec, keys: Keys, context: int) -> dict[str, object]:
    """A rope that was read from GGUF `keys`, of a model of `context` positions, as config.json says it: in the spelling
    that every version of transformers reads. The first training's context of long factors stands beside it.

    Raises UnsupportedModelError for factors that have no name there.
    """
    return {"rope_theta": rope.theta, "rope_scaling": _scaling_to_config(rope, keys, context)}


def _scaling_to_config(rope: RopeSpec, keys: Keys, context: int) -> dict[str, object] | None:
    if rope.long_factors:
        scaling: dict[str, object] = {
            "type": "longrope",  # under this name alone Phi-3's first readers know it, and with no key more
            "short_factor": list(rope.factors),
            "long_factor": list(rope.long_factors),
        }
        usual = longrope_attention(context / rope.original_context, rope.original_context)
        return scaling | _attention_to_config(rope, usual)
    if keys.get("rope.scaling.type") == "yarn":
        factor = keys.positive("rope.scaling.factor", default=1.0)
        original = keys.count("rope.scaling.original_context_length", context)
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for key in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{key}") is not None:
                scaling[key] = keys.positive(f"rope.scaling.yarn_{key}")
        return scaling | _attention_to_config(rope, yarn_attention(factor))
    slowest = max(rope.factors, default=1.0)
    if min(rope.factors, default=1.0) == slowest:
        return None if slowest == 1.0 else {"rope_type": "linear", "factor": slowest}
    llama3 = llama3_factors(
        rope.theta,
        rope.dim,
        factor=slowest,
        low_freq_factor=_LLAMA3_TURNS["low_freq_factor"],
        high_freq_factor=_LLAMA3_TURNS["high_freq_factor"],
        original_context=_LLAMA3_CONTEXT,
    )
    if not np.allclose(llama3, rope.factors, rtol=ROUNDED, atol=0.0):
        raise UnsupportedModelError(
            "rope_freqs.weight must hold the factors of Llama 3.1 or later: config.json has no words for others."
        )
    return {
        "rope_type": "llama3",
        "factor": slowest,
        **_LLAMA3_TURNS,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def _attention_to_config(rope: RopeSpec, usual: float) -> dict[str, object]:
    """Nothing where it is what readers take by themselves."""
    unusual = not math.isclose(rope.attention_factor, usual, rel_tol=ROUNDED)
    return {"attention_factor": rope.attention_factor} if unusual else {}


def alike(one: RopeSpec, other: RopeSpec) -> bool:
    """Whether two ropes turn by the same angles, but for what float32 rounds off."""
    contexts = (0, one.original_context, one.original_context + 1)
    return (
        (one.theta, one.dim, one.original_context) == (other.theta, other.dim, other.original_context)
        and math.isclose(one.attention_factor, other.attention_factor, rel_tol=ROUNDED)
        and all(np.allclose(one.frequencies(n), other.frequencies(n), rtol=ROUNDED, atol=0.0) for n in contexts)
    )


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


def yarn_factors(
    theta: float,
    dim: int,
    *,
    factor: float,
    original_context: int,
    beta_fast: float,
    beta_slow: float,
    whole: bool = True,
) -> tuple[float, ...]:
    """YaRN (Peng et al., 2023): pairs that turn more than `beta_fast` times within the original context stay, those
    that turn less than `beta_slow` times are slowed down by `factor`, and between them the two are mixed. `whole`: the
    two bounds are pairs, rounded outwards."""

    if theta <= 1:
        raise UnsupportedModelError(f"rope_theta must be above 1 beside yarn, got {theta:g}.")

    def pair_of(turns: float) -> float:
        return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slowed = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    yarn: list[float] = (1.0 / (slowed / factor + 1.0 - slowed)).tolist()
    return tuple(yarn)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_attention(factor: float, original_context: int) -> float:
    """The same of LongRoPE, for a context `factor` times the original one."""
    if factor <= 1.0:
        return 1.0
    if original_context < 2:
        raise UnsupportedModelError(f"original_max_position_embeddings must be at least 2, got {original_context}.")
    return math.sqrt(1 + math.log(factor) / math.log(original_context))
