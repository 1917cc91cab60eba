"""The machine that is measured on, in the words that its kernel has for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_PERIOD = "cpu.max"


def describe(root: Path = Path("/")) -> Mapping[str, str]:
    """Processor, instructions, caches, memory and system; what cannot be told is left out."""
    processor = _fields(root / "proc/cpuinfo")
    memory = _fields(root / "proc/meminfo")
    flags = set(processor.get("flags", "").split())
    caches = []
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(index / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and size:
            caches.append(f"L{level} {size}")
    facts = {
        "processor": processor.get("model name", ""),
        "CPUs of the process": str(len(os.sched_getaffinity(0))),
        "cgroup quota": _text(root / "sys/fs/cgroup" / _PERIOD),
        "instructions": ", ".join(name for name in FEATURES if name in flags),
        "caches of a core": ", ".join(caches),
        "memory": _gib(memory.get("MemTotal", "")),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }
    return {name: value for name, value in facts.items() if value}


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _gib(text: str) -> str:
    number = text.split()[0] if text else ""
    return f"{int(number) / 2**20:.1f} GiB" if number.isdigit() else ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _fields(path: Path) -> Mapping[str, str]:
    """The first value of each "name: value" line."""
    fields: dict[str, str] = {}
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields
