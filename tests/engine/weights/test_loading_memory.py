"""Loading needs at most the packed size plus one tensor of memory, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.config import DEFAULT_MODEL
from engine.weights.checkpoint import open_checkpoint
from engine.weights.source import resolve
from tests.tiny_gguf import TinyLlama
from tests.tiny_hf import TinyFolder

ROOT = Path(__file__).parents[3]
SLACK = 8 << 20
"""For what does not grow with the weights: the header, the tokenizer, the allocator's rounding."""

LOAD_AND_MEASURE = """
import sys
from pathlib import Path

import numpy as np

from engine.kernels import create_program
from engine.weights import load_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

def load(path):
    return load_model(path, home=Path(home), quantization=quantization or None)

warm, path, home, quantization = sys.argv[1:]
load(warm).close()  # modules, tables, the allocator's own
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
model = load(path)
loading = status("VmHWM") - before
program = create_program(model.info.spec, model.weights, num_blocks=1, threads=1)
for tensor in model.weights.values():
    tensor.data.view(np.uint8)[:: 4 << 10].max()  # every page becomes resident, as it does in the first step
print(loading, status("VmHWM") - before, model.nbytes)
program.close()
"""


@dataclass(frozen=True)
class Measured:
    """Bytes by which a process grew, at the most."""

    loading: int  # until `load_model` returned
    resident: int  # until a program stood and every weight was in memory
    packed: int  # of the packed file


def measure(warm: Path, checkpoint: Path, home: Path, quantization: str | None) -> Measured:
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, str(warm), str(checkpoint), str(home), quantization or ""],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return Measured(*map(int, done.stdout.split()))


SHAPE: dict[str, Any] = {"hidden": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "ffn": 18432}
LAYERS = pytest.mark.parametrize("layers", [1, pytest.param(4, marks=pytest.mark.full)])
"""59 and 237 million weights, in tensors of up to 19 million."""


def assert_bounded(tmp_path: Path, warm: Path, checkpoint: Path, quantization: str | None, largest: int) -> None:
    """`largest`: bytes of the largest tensor, as the checkpoint stores it."""
    home = tmp_path / "home"
    cold = measure(warm, checkpoint, home, quantization)
    assert largest > 2 * SLACK  # or another tensor could hide in it
    # Packing writes and does not keep: what is held of the weights is less than one tensor.
    assert cold.loading <= largest + SLACK
    assert cold.resident <= cold.packed + largest
    again = measure(warm, checkpoint, home, quantization)
    assert again.packed == cold.packed
    assert again.loading <= SLACK
    assert again.resident <= again.packed + SLACK


@LAYERS
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_folder(tmp_path: Path, layers: int, quantization: str) -> None:
    model = TinyFolder(**SHAPE, layers=layers)
    checkpoint = model.write(tmp_path / "large", shards=2)
    warm = TinyFolder().write(tmp_path / "warm")
    largest = 2 * max(values.size for values in model.tensors.values())
    assert_bounded(tmp_path, warm, checkpoint, quantization, largest)


@LAYERS
@pytest.mark.parametrize(("quant", "weight_bytes"), [("Q8_0", 34 / 32), ("F16", 2)])
def test_gguf(tmp_path: Path, layers: int, quant: str, weight_bytes: float) -> None:
    model = TinyLlama(**SHAPE, layers=layers, quant=quant)
    checkpoint = model.write(tmp_path / "large.gguf")
    warm = TinyLlama(quant=quant).write(tmp_path / "warm.gguf")
    largest = int(weight_bytes * max(values.size for values in model.tensors.values()))
    assert_bounded(tmp_path, warm, checkpoint, None, largest)


@pytest.mark.full
def test_default_model(tmp_path: Path) -> None:
    """With a tokenizer of 49,152 tokens, whose reading takes as much as that of the weights."""
    checkpoint = resolve(DEFAULT_MODEL)
    with open_checkpoint(checkpoint) as opened:
        largest = max(tensor.nbytes for tensor in opened.tensors.values())
    warm = TinyLlama().write(tmp_path / "warm.gguf")
    cold = measure(warm, checkpoint, tmp_path / "home", None)
    assert max(cold.loading, cold.resident) <= cold.packed + largest
    again = measure(warm, checkpoint, tmp_path / "home", None)
    assert max(again.loading, again.resident) <= again.packed + SLACK
