from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.cache.sizing import Needs, divide_kv_memory, fit_kv_memory, num_kv_blocks
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


# Several engines

LARGE = dataclasses.replace(SPEC, num_kv_heads=2)
LBLOCK = BLOCK_SIZE * LARGE.kv_bytes_per_token()
AUTO_BLOCKS = AUTO_KV_TOKENS // BLOCK_SIZE


def divided(memory: int, *weights: int, other: int = 0, **fields: Any) -> list[int]:
    """Blocks of each of two engines, whose first has larger blocks."""
    configs = [EngineConfig(model=name, **fields) for name in "ab"]
    models = [Needs(LARGE, weights[0]), Needs(SPEC, weights[1])]
    result = divide_kv_memory(configs, models, other_bytes=other, memory=lambda: memory)
    assert all(one.kv_cache_memory is None for one in result)
    return [(one.kv_cache_tokens or 0) // BLOCK_SIZE for one in result]


@pytest.mark.parametrize(
    ("memory", "weights", "fields", "expected"),
    [
        (PLENTY, (1, 1), {}, [AUTO_BLOCKS, AUTO_BLOCKS]),  # each has what it has alone, where there is plenty
        (80 * LBLOCK, (1, 1), {}, [10, 20]),  # halves of a quarter of the memory
        (80 * LBLOCK, (35 * LBLOCK, 35 * LBLOCK), {}, [5, 10]),  # halves of what the weights leave
        (PLENTY, (1, 1), {"kv_cache_memory": 12 * LBLOCK + 1}, [6, 12]),  # for both
        (100 * LBLOCK, (1, 1), {"kv_cache_memory": "30%"}, [15, 30]),
        (PLENTY, (1, 1), {"kv_cache_tokens": 96}, [3, 3]),  # of each
        (PLENTY, (1, 1), {"max_model_len": AUTO_KV_TOKENS + 1}, [AUTO_BLOCKS + 1, AUTO_BLOCKS + 1]),
    ],
)
def test_memory_is_divided(memory: int, weights: tuple[int, int], fields: dict[str, Any], expected: list[int]) -> None:
    assert LBLOCK == 2 * BLOCK
    assert divided(memory, *weights, **fields) == expected


@pytest.mark.parametrize(
    ("memory", "weights", "other", "fields", "said"),
    [
        (10 * LBLOCK, (6 * LBLOCK, 4 * LBLOCK), 0, {}, "The weights of a, b take .*, and this process may use"),
        (10 * LBLOCK, (3 * LBLOCK, 3 * LBLOCK), 4 * LBLOCK, {}, "The weights of a, b take"),
        (
            10 * LBLOCK,
            (3 * LBLOCK, 3 * LBLOCK),
            0,
            {"kv_cache_memory": "50%"},
            "The KV memory must be at most .*, which ",
        ),
        (10 * LBLOCK, (3 * LBLOCK, 3 * LBLOCK), 0, {"kv_cache_tokens": 96}, "The KV memory must be at most"),
        (10 * LBLOCK, (1, 1), 0, {"kv_cache_memory": "200GB"}, "kv_cache_memory must be at most"),
        (PLENTY, (1, 1), 0, {"kv_cache_memory": 3 * LBLOCK}, "kv_cache_memory must leave at least .* for a, which 64 "),
        (10 * LBLOCK, (4 * LBLOCK, 4 * LBLOCK), 0, {}, "The KV memory must be at most"),  # the least there can be
    ],
)
def test_what_does_not_fit_together(
    memory: int, weights: tuple[int, int], other: int, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        divided(memory, *weights, other=other, **fields)


def test_one_engine_sees_to_itself() -> None:
    config = EngineConfig(kv_cache_memory="10%")
    assert divide_kv_memory([config], [Needs(SPEC, PLENTY)], memory=lambda: 1) == [config]


@pytest.mark.parametrize(
    ("used", "fields", "expected"),
    [
        (0, {}, 20),  # a quarter of what is left
        (40 * BLOCK, {}, 10),
        (40 * BLOCK, {"kv_cache_memory": "25%"}, 25),  # of all memory
        (40 * BLOCK, {"kv_cache_memory": 40 * BLOCK}, 40),
        (40 * BLOCK, {"kv_cache_tokens": 96}, 3),
    ],
)
def test_one_more_engine(used: int, fields: dict[str, Any], expected: int) -> None:
    fitted = fit_kv_memory(EngineConfig(**fields), Needs(SPEC, 20 * BLOCK), used=used, memory=lambda: 100 * BLOCK)
    assert fitted.kv_cache_tokens == expected * BLOCK_SIZE


@pytest.mark.parametrize(
    ("used", "fields", "said"),
    [
        (80, {}, "The weights of m take .*, and of the .* are left"),
        (99, {}, "The weights of m take"),
        (79, {}, "The KV memory must be at most"),
        (40, {"kv_cache_memory": 41 * BLOCK}, "The KV memory must be at most .*, which are left of the"),
        (40, {"kv_cache_tokens": 41 * BLOCK_SIZE}, "The KV memory must be at most"),
        (0, {"kv_cache_memory": 1}, "kv_cache_memory must leave at least"),
    ],
)
def test_one_more_engine_that_does_not_fit(used: int, fields: dict[str, Any], said: str) -> None:
    config = EngineConfig(model="m", **fields)
    with pytest.raises(ConfigError, match=said):
        fit_kv_memory(config, Needs(SPEC, 20 * BLOCK), used=used * BLOCK, memory=lambda: 100 * BLOCK)
