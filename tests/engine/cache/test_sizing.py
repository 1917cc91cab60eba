from __future__ import annotations

from typing import Any

import pytest

from engine.cache.sizing import num_kv_blocks
from engine.config import AUTO_KV_TOKENS, BLOCK_SIZE, EngineConfig
from engine.errors import ConfigError
from tests.engine.fakes import make_spec

SPEC = make_spec()
BLOCK = BLOCK_SIZE * SPEC.kv_bytes_per_token()  # bytes
PLENTY = 1 << 40


def blocks(memory: int = PLENTY, **fields: Any) -> int:
    return num_kv_blocks(EngineConfig(**fields), SPEC, memory=lambda: memory)


@pytest.mark.parametrize(
    ("memory", "fields", "expected"),
    [
        (PLENTY, {}, AUTO_KV_TOKENS // BLOCK_SIZE),
        (PLENTY, {"max_model_len": AUTO_KV_TOKENS + 1}, AUTO_KV_TOKENS // BLOCK_SIZE + 1),  # what was asked for fits
        (PLENTY, {"max_model_len": 100}, AUTO_KV_TOKENS // BLOCK_SIZE),
        (40 * BLOCK, {}, 10),  # a quarter of the memory
        (4 * BLOCK, {}, 2),  # the least there can be
        (PLENTY, {"kv_cache_tokens": 96}, 3),
        (PLENTY, {"kv_cache_tokens": 97}, 4),  # whole blocks
        (PLENTY, {"kv_cache_memory": 5 * BLOCK}, 5),
        (PLENTY, {"kv_cache_memory": 6 * BLOCK - 1}, 5),  # never more than that
        (PLENTY, {"kv_cache_memory": f"{7 * BLOCK}B"}, 7),
        (100 * BLOCK, {"kv_cache_memory": "30%"}, 30),
        (100 * BLOCK, {"kv_cache_memory": "100%"}, 100),
    ],
)
def test_blocks(memory: int, fields: dict[str, Any], expected: int) -> None:
    assert blocks(memory, **fields) == expected


@pytest.mark.parametrize(
    ("memory", "fields", "said"),
    [
        (10 * BLOCK, {"kv_cache_tokens": 352}, "kv_cache_tokens must be at most 320, which fill .* got 352."),
        (10 * BLOCK, {"kv_cache_memory": 11 * BLOCK}, "kv_cache_memory must be at most the .* may use, got"),
        (PLENTY, {"kv_cache_memory": BLOCK}, "kv_cache_memory must be at least .*, which 64 tokens of this model take"),
        (3 * BLOCK, {"kv_cache_memory": "25%"}, "kv_cache_memory must be at least .* got '25%'."),
        (PLENTY, {"kv_cache_memory": -1}, "kv_cache_memory must be"),
    ],
)
def test_what_cannot_be(memory: int, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        blocks(memory, **fields)
