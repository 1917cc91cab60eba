"""Recorded lines of llama-bench and llama-batched-bench, build 11434, shortened in the middle."""

from __future__ import annotations

import pytest

from loadtests.peers.llamacpp import parse_batched_bench, parse_bench
from loadtests.peers.processes import SystemFailure

BENCH = (
    '{"build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU", '
    '"model_type": "llama 256M Q4_0", "model_size": 89941248, "n_threads": 2, "flash_attn": -1, "n_prompt": 512, '
    '"n_gen": 0, "n_depth": 0, "test_time": "2026-11-24T04:28:10Z", "avg_ns": 572059511, "stddev_ns": 0, '
    '"avg_ts": 895.011778, "stddev_ts": 0.000000, "samples_ns": [ 572059511 ],"samples_ts": [ 895.012 ]}\n'
)
BATCHED = (
    '{"n_kv_max": 8192, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1, '
    '"n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 64, "pl": 32, "n_kv": 6144, "t_pp": 4.524163, '
    '"speed_pp": 905.360901, "t_tg": 7.724543, "speed_tg": 265.128937, "t": 12.248706, "speed": 501.604004}\n\n'
)


def test_the_rates_are_found() -> None:
    assert parse_bench(BENCH) == 895.011778
    assert parse_batched_bench("\n" + BATCHED) == 265.128937


@pytest.mark.parametrize("printed", ["", "error: no model\n", BENCH + BENCH, BATCHED, BENCH[:-3] + "\n"])
def test_anything_else_is_a_failure(printed: str) -> None:
    with pytest.raises(SystemFailure, match="expected one JSON line with avg_ts"):
        parse_bench(printed)


def test_a_rate_of_nothing_is_a_failure() -> None:
    with pytest.raises(SystemFailure, match="positive speed_tg"):
        parse_batched_bench(BATCHED.replace("265.128937", "0.0"))
