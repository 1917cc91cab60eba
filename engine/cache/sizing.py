"""How large the KV cache is: in blocks, from what was asked for and what the machine has."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    wanted = math.ceil(max(AUTO_KV_TOKENS, config.max_model_len or 0) / BLOCK_SIZE)
    return max(MIN_KV_TOKENS // BLOCK_SIZE, min(wanted, int(AUTO_KV_SHARE * limit) // per_block))


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
