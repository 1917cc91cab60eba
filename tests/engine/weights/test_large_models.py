"""A checkpoint in the shape of a 7B model: what it takes to load and to serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.tiny_gguf import TinyLlama

ROOT = Path(__file__).parents[3]
LIMIT = 6 << 30
CONTEXT = 4096

SERVE_AND_MEASURE = """
import sys
from pathlib import Path

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.request import Request, SamplingParams
from engine.weights import load_model

path, home, context = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
model = load_model(path, home=home)
core = EngineCore(EngineConfig(max_model_len=context, kv_cache_tokens=context, max_num_seqs=1), model)
prompt = [3 + i % 250 for i in range(context - 4)]
sampling = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
core.add(Request(request_id="r", model=model.name, prompt_token_ids=prompt, sampling=sampling, seed=0))
tokens = []
while core.has_work:
    for delta in core.step():
        assert delta.error is None, delta.error
        tokens += delta.token_ids
assert len(tokens) == 4, tokens
core.close()
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")))
"""


def write_7b(path: Path) -> None:
    """Mistral 7B's shape in Q4_0, its blocks drawn once and used again for every tensor."""
    layers, hidden, ffn, kv_size, vocab = 32, 4096, 14336, 1024, 32000
    tiny = TinyLlama(hidden=hidden, layers=1, heads=32, kv_heads=8, head_dim=128, ffn=32, context=32768)
    blocks = np.random.default_rng(0).integers(0, 256, (vocab * hidden // 32, 18), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(1 / (8 * hidden**0.5)).tobytes(), np.uint8)  # their scales
    flat = blocks.reshape(-1)
    sizes = {"llama.block_count": layers, "llama.feed_forward_length": ffn, "llama.vocab_size": vocab}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in tiny.metadata.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif key.startswith("llama.") and isinstance(value, int):
            writer.add_uint32(key, sizes.get(key, value))
    for key in ("model", "pre"):
        writer.add_string(f"tokenizer.ggml.{key}", str(tiny.metadata[f"tokenizer.ggml.{key}"]))
    for key in ("tokens", "token_type", "merges"):
        values = tiny.metadata[f"tokenizer.ggml.{key}"]
        assert isinstance(values, list)
        writer.add_array(f"tokenizer.ggml.{key}", values)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)

    def matrix(name: str, outputs: int, inputs: int) -> None:
        row = inputs // 32 * 18
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, flat[: outputs * row].reshape(outputs, row), raw_dtype=kind)

    def vector(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    matrix("token_embd.weight", vocab, hidden)
    for i in range(layers):
        vector(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", hidden, hidden)
        matrix(f"blk.{i}.attn_k.weight", kv_size, hidden)
        matrix(f"blk.{i}.attn_v.weight", kv_size, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, hidden)
        vector(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_up.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ffn)
    vector("output_norm.weight")
    matrix("output.weight", vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.full
def test_a_7b_model_serves_4096_tokens_in_6_gib(tmp_path: Path) -> None:
    """From the checkpoint on: what packing takes counts too."""
    path = tmp_path / "large.gguf"
    write_7b(path)
    done = subprocess.run(
        [sys.executable, "-c", SERVE_AND_MEASURE, str(path), str(tmp_path / "home"), str(CONTEXT)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    resident = int(done.stdout)
    print(f"{resident / 2**30:.2f} GiB")
    assert resident < LIMIT
