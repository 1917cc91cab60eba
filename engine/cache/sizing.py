"""How large the KV cache is: in blocks, from what was asked for and what the machine has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.config import (
    AUTO_KV_SHARE,
    AUTO_KV_TOKENS,
    BLOCK_SIZE,
    MIN_KV_TOKENS,
    EngineConfig,
    memory_limit,
    parse_memory,
)
from engine.errors import ConfigError
from engine.models.spec import DecoderSpec

if TYPE_CHECKING:
    from engine.weights import PackedModel


def num_kv_blocks(config: EngineConfig, spec: DecoderSpec, *, memory: Callable[[], int] = memory_limit) -> int:
    """Blocks of the KV cache; `memory` tells the bytes this process may use.

    kv_cache_tokens counts exactly (in whole blocks), kv_cache_memory is never exceeded. Without either it is
    AUTO_KV_TOKENS, or max_model_len where that is more, as far as AUTO_KV_SHARE of the memory goes. Raises ConfigError
    where it cannot hold MIN_KV_TOKENS or does not fit the memory.
    """
    per_block = BLOCK_SIZE * spec.kv_bytes_per_token(config.kv_cache_dtype)
    limit = memory()
    if config.kv_cache_tokens is not None:
        num_blocks = math.ceil(config.kv_cache_tokens / BLOCK_SIZE)
        if num_blocks * per_block > limit:
            raise ConfigError(
                f"kv_cache_tokens must be at most {limit // per_block * BLOCK_SIZE}, which fill the {readable(limit)} "
                f"of memory that this process may use, got {config.kv_cache_tokens}."
            )
        return num_blocks
    if config.kv_cache_memory is not None:
        num_blocks = _bytes(config.kv_cache_memory, limit) // per_block
        least = MIN_KV_TOKENS // BLOCK_SIZE
        if num_blocks < least:
            raise ConfigError(
                f"kv_cache_memory must be at least {least * per_block} bytes, which {MIN_KV_TOKENS} tokens of this "
                f"model take, got {config.kv_cache_memory!r}."
            )
        return num_blocks
    return _auto_blocks(config, int(AUTO_KV_SHARE * limit) // per_block)


@dataclass(frozen=True, slots=True)
class Needs:
    """What decides how much memory a model takes: its weights, and how large keys and values of a token are."""

    spec: DecoderSpec
    weights_bytes: int

    @classmethod
    def of(cls, model: PackedModel) -> Needs:
        """Those of a mapped decoder."""
        assert isinstance(model.info.spec, DecoderSpec)
        return cls(model.info.spec, model.nbytes)


def divide_kv_memory(
    configs: Sequence[EngineConfig],
    models: Sequence[Needs],
    *,
    other_bytes: int = 0,
    memory: Callable[[], int] = memory_limit,
) -> list[EngineConfig]:
    """The configurations of engines that run side by side, each told the tokens of its own KV cache.

    kv_cache_memory is for all of them: each gets an equal share. kv_cache_tokens is of each. Without either they share
    what one engine would take, or what all weights (and `other_bytes`) leave of the memory if that is less. One engine
    alone sees to itself. Raises ConfigError where it does not fit.
    """
    if len(configs) <= 1:
        return list(configs)
    limit = memory()
    weights = sum(model.weights_bytes for model in models) + other_bytes
    left = limit - weights
    names = ", ".join(config.model for config in configs)
    if left <= 0:
        raise ConfigError(
            f"The weights of {names} take {readable(weights)}, and this process may use {readable(limit)} of memory."
        )
    asked = configs[0].kv_cache_memory
    total = min(int(AUTO_KV_SHARE * limit), left) if asked is None else _bytes(asked, limit)
    divided = [
        _with_blocks(config, model.spec, total // len(models)) for config, model in zip(configs, models, strict=True)
    ]
    _need_room(divided, models, left, f"which the weights of {names} leave of the {readable(limit)}")
    return divided


def fit_kv_memory(
    config: EngineConfig, model: Needs, *, used: int, memory: Callable[[], int] = memory_limit
) -> EngineConfig:
    """The configuration of one more engine beside those that take `used` bytes, told the tokens of its KV cache.

    Where neither kv_cache_memory nor kv_cache_tokens says more, it is as much as an engine alone takes, at most
    AUTO_KV_SHARE of what is left. Raises ConfigError where it does not fit.
    """
    limit = memory()
    left = need_room(config.model, model.weights_bytes, used=used, memory=memory)
    asked = config.kv_cache_memory
    share = int(AUTO_KV_SHARE * left) if asked is None else _bytes(asked, limit)
    fitted = _with_blocks(config, model.spec, share)
    _need_room([fitted], [model], left, f"which are left of the {readable(limit)}")
    return fitted


def need_room(name: str, weights_bytes: int, *, used: int, memory: Callable[[], int] = memory_limit) -> int:
    """Bytes that are left beside those that take `used` bytes and these weights. Raises ConfigError where none are."""
    limit = memory()
    left = limit - used - weights_bytes
    if left <= 0:
        raise ConfigError(
            f"The weights of {name} take {readable(weights_bytes)}, and of the {readable(limit)} of memory that this "
            f"process may use {readable(max(0, limit - used))} are left."
        )
    return left


def kv_cache_bytes(config: EngineConfig, spec: DecoderSpec) -> int:
    """Bytes of the KV cache whose tokens a configuration gives."""
    assert config.kv_cache_tokens is not None
    return math.ceil(config.kv_cache_tokens / BLOCK_SIZE) * BLOCK_SIZE * spec.kv_bytes_per_token(config.kv_cache_dtype)


def _auto_blocks(config: EngineConfig, most: int) -> int:
    """Blocks where nothing says how many: for AUTO_KV_TOKENS or max_model_len, whichever is more, at most `most`."""
    wanted = math.ceil(max(AUTO_KV_TOKENS, config.max_model_len or 0) / BLOCK_SIZE)
    return max(MIN_KV_TOKENS // BLOCK_SIZE, min(wanted, most))


def _with_blocks(config: EngineConfig, spec: DecoderSpec, share: int) -> EngineConfig:
    """The configuration with its kv_cache_tokens: those it has, or what `share` bytes hold."""
    if config.kv_cache_tokens is not None:
        return config
    per_block = BLOCK_SIZE * spec.kv_bytes_per_token(config.kv_cache_dtype)
    num_blocks, least = share // per_block, MIN_KV_TOKENS // BLOCK_SIZE
    if config.kv_cache_memory is None:
        num_blocks = _auto_blocks(config, num_blocks)
    if num_blocks < least:
        raise ConfigError(
            f"kv_cache_memory must leave at least {least * per_block} bytes for {config.model}, which {MIN_KV_TOKENS} "
            f"of its tokens take, got {config.kv_cache_memory!r}."
        )
    return replace(config, kv_cache_memory=None, kv_cache_tokens=num_blocks * BLOCK_SIZE)


def _need_room(configs: Sequence[EngineConfig], models: Sequence[Needs], left: int, why: str) -> None:
    """Raise ConfigError unless the KV caches fit into `left` bytes."""
    taken = sum(kv_cache_bytes(config, model.spec) for config, model in zip(configs, models, strict=True))
    if taken > left:
        raise ConfigError(
            f"The KV memory must be at most {readable(left)} (kv_cache_memory, kv_cache_tokens), {why} of memory that "
            f"this process may use; it would be {readable(taken)}."
        )


def readable(nbytes: int) -> str:
    """Bytes for people: 377 MB, 2.1 GB."""
    return f"{nbytes / 1e6:,.0f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.1f} GB"


def _bytes(asked: int | str, limit: int) -> int:
    """The bytes that kv_cache_memory asks for. Raises ConfigError where there are not as many."""
    amount = parse_memory(asked) if isinstance(asked, str) else asked
    nbytes = int(amount * limit) if isinstance(amount, float) else amount
    if not 0 < nbytes <= limit:
        raise ConfigError(
            f"kv_cache_memory must be at most the {readable(limit)} of memory that this process may use, got {asked!r}."
        )
    return nbytes
