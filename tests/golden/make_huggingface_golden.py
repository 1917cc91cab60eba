"""Make hf_*.npz and huggingface_configs.json with Hugging Face transformers; README.md says how and what.

Every folder is loaded by transformers itself, from its files, and computed in float32 on the CPU. Nothing of `engine`
is imported: the reference must not share our mistakes. Names of folders as arguments make their files alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.golden.huggingface import FOLDERS, stored_digest, write_folder

HERE = Path(__file__).parent
NUM_TOKENS = 70

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "vocab_size": 64,
}
_MISTRAL: dict[str, Any] = {**_LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXT = {"original_max_position_embeddings": 8192}

CONFIGS: tuple[dict[str, Any], ...] = (
    # Everything that may be left out is.
    _LLAMA,
    _MISTRAL,
    {**_LLAMA, "num_key_value_heads": None, "head_dim": None, "rope_scaling": None},
    {**_MISTRAL, "head_dim": None, "sliding_window": None},
    {**_LLAMA, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    {**_MISTRAL, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": 100, "max_position_embeddings": 200},
    {**_MISTRAL, "sliding_window": 300, "max_position_embeddings": 200},
    {**_LLAMA, "sliding_window": 100, "hidden_act": "swish"},
    # The same rope in every spelling.
    {**_LLAMA, "rope_theta": 500000.0},
    {**_LLAMA, "rope_parameters": {"rope_theta": 500000.0}},
    {**_LLAMA, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
    {**_LLAMA, "rope_theta": 100000.0, "rope_parameters": {"rope_type": "default"}},
    {**_LLAMA, "rope_theta": 100000.0, "rope_parameters": {"rope_theta": 500000.0}},
    {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {**_LLAMA, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}},
    {**_LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0, "type": "default"}},
    {**_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}},
    {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 1e6}},
    # Llama 3.1's scaling, as published and in other shapes.
    {
        **_LLAMA,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3, **_CONTEXT, "rope_type": "llama3"},
    },
    {
        **_LLAMA,
        "max_position_embeddings": 131072,
        "rope_parameters": {**_LLAMA3, **_CONTEXT, "factor": 32.0, "rope_type": "llama3", "rope_theta": 500000.0},
    },
    {**_LLAMA, "max_position_embeddings": 4096, "rope_scaling": {**_LLAMA3, "type": "llama3"}},
    {
        **_LLAMA,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
        "rope_scaling": {**_LLAMA3, **_CONTEXT, "rope_type": "llama3", "low_freq_factor": 2, "high_freq_factor": 3},
    },
    {
        **_LLAMA,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rope_scaling": {**_LLAMA3, "rope_type": "llama3", "original_max_position_embeddings": 32},
    },
)


def make_folders(names: Iterable[str]) -> None:
    """For each of these FOLDERS, token ids of one sequence and all its logits."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = write_folder(Path(folder), name)
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
        assert not any(info.values()), info
        token_ids = np.random.default_rng(70).integers(0, model.config.vocab_size, NUM_TOKENS, dtype=np.int32)
        with torch.inference_mode():
            logits = model.eval()(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].numpy()
        np.savez_compressed(
            HERE / f"hf_{name}.npz", token_ids=token_ids, logits=logits, stored_digest=stored_digest(name)
        )
        print(f"{name}: {list(logits.shape)}, root mean square {np.sqrt(np.square(logits).mean()):.3f}")


def read_config(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json: the numbers that its arithmetic uses."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling == 1.0
    return {
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "norm_eps": model.model.norm.variance_epsilon,
        "max_position": config.max_position_embeddings,
        "sliding_window": config.sliding_window if config.model_type == "mistral" else None,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "activation": type(model.model.layers[0].mlp.act_fn).__name__,
        "inv_freq": rotary.inv_freq.tolist(),  # float32, written out exactly
    }


def main() -> None:
    make_folders(sys.argv[1:] or FOLDERS)
    if sys.argv[1:]:
        return
    cases = [json.dumps({"config": values, "read": read_config(values)}) for values in CONFIGS]
    made_with = json.dumps(f"transformers {transformers.__version__}")
    lines = ",\n".join(cases)
    (HERE / "huggingface_configs.json").write_text(f'{{"made_with": {made_with}, "configs": [\n{lines}\n]}}\n')
    print(f"{len(CONFIGS)} configurations")


if __name__ == "__main__":
    main()
