"""The configuration: what is refused, sizes of memory, and what this machine and its cgroups allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, memory_limit, parse_memory
from engine.errors import ConfigError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("800MB", 800_000_000),
        ("800 mb", 800_000_000),
        ("2GiB", 2 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        (" 64KiB ", 65536),
        ("1TB", 10**12),
        ("25%", 0.25),
        ("12.5 %", 0.125),
        ("100%", 1.0),
    ],
)
def test_memory_sizes(text: str, value: float) -> None:
    parsed = parse_memory(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "101%", "0.0GB", "-1", "1e9", "GiB", "2XB", "2 GiBB", "nan", "inf%", "1" * 30]
)
def test_what_is_no_memory_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_memory(text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be between 1 and 1024, got 0."),
        ({"kv_cache_tokens": 63}, "kv_cache_tokens must be at least 64, got 63."),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory must be a size as 2GiB or 800MB, or a share of .*, got 'lots'."),
        ({"kv_cache_tokens": 64, "kv_cache_memory": 1}, "kv_cache_tokens and kv_cache_memory both .* got 64 and 1."),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be one of bf16, int8, got 'fp8'."),
        ({"speculation": "eagle"}, "speculation must be one of prompt-lookup, off, got 'eagle'."),
        ({"huge_pages": "yes"}, "huge_pages must be one of auto, on, off, got 'yes'."),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be between 1 and 1024, got 0."),
        (
            {"tensor_parallel_size": 3, "threads": 2},
            r"threads must be at least tensor_parallel_size \(3\), one for each rank, got 2.",
        ),
        ({"stall_timeout": float("nan")}, "stall_timeout must be between 0.01 and 3600 seconds, got nan."),
        ({"quantization": "int2"}, "quantization must be one of none, int8, int4, got 'int2'."),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**fields)


def machine(folder: Path, groups: str, limits: dict[str, str], total_kb: int = 16 << 20) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup of our own; `limits` are files by their path."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal:       {total_kb} kB\nMemFree:  1 kB\n")
    (proc / "self" / "cgroup").write_text(groups)
    for name, text in limits.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    return proc, cgroups


V1 = "9:name=systemd:/\n4:memory:/box/inner\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "limits", "gibs"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"memory.max": "max\n"}, 16),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n"}, 2),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{3 * GIB}\n"}, 3),  # a group above ours
        ("0::/host/path\n", {"memory.max": f"{GIB}\n"}, 1),  # a container whose mount begins at its own group
        ("0::/a\n", {"unified/a/memory.max": f"{4 * GIB}\n"}, 4),
        (V1, {"memory/box/inner/memory.limit_in_bytes": f"{5 * GIB}\n"}, 5),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 16),  # version 1's "none"
        ("0::/\n", {"memory.max": f"{64 * GIB}\n"}, 16),  # more than there is
    ],
)
def test_the_memory_this_process_may_use(tmp_path: Path, groups: str, limits: dict[str, str], gibs: int) -> None:
    assert memory_limit(*machine(tmp_path, groups, limits)) == gibs * GIB


def test_a_kernel_without_cgroups(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, "", {})
    (proc / "self" / "cgroup").unlink()
    assert memory_limit(proc, cgroups) == 16 * GIB


def test_this_machine_has_memory() -> None:
    assert memory_limit() > 64 << 20
