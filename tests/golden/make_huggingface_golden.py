"""Make hf_*.npz and huggingface_configs.json with Hugging Face transformers; README.md says how and what.

Every folder is loaded by transformers itself, from its files, and computed in float32 on the CPU. Nothing of `engine`
is imported: the reference must not share our mistakes. Names of folders as arguments make their files alone, the word
families family_configs.json.
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


_FEW = {**_LLAMA, "num_key_value_heads": 2}  # the families' own number is more than there are heads
_QWEN2: dict[str, Any] = {**_FEW, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_QWEN3: dict[str, Any] = {**_FEW, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
_PHI3: dict[str, Any] = {
    **_LLAMA, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "num_hidden_layers": 2, "pad_token_id": 0,
}  # fmt: skip
_MIXTRAL: dict[str, Any] = {**_LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
_GEMMA2: dict[str, Any] = {
    **_LLAMA, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 5,
}  # fmt: skip
_GEMMA3: dict[str, Any] = {
    **_GEMMA2, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 8,
}  # fmt: skip
_YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
_LONG = {"short_factor": [1.0 + i / 32 for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
_SLIDING = {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 100}

FAMILY_CONFIGS: tuple[dict[str, Any], ...] = (
    _QWEN2,
    {**_QWEN2, **_SLIDING, "max_window_layers": 2},
    {**_QWEN2, **_SLIDING, "use_sliding_window": False},
    {**_QWEN2, "rope_theta": 1e6, "rope_scaling": {**_YARN, "type": "yarn"}},
    {**_QWEN2, "rope_parameters": {**_YARN, "rope_type": "yarn", "rope_theta": 1e6, "attention_factor": 1.5}},
    {**_QWEN2, "rope_scaling": {**_YARN, "type": "yarn", "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    {**_QWEN2, "rope_scaling": {**_YARN, "type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.1}},
    {**_QWEN2, "max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    _QWEN3,
    {**_QWEN3, "head_dim": 64, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {**_QWEN3, **_SLIDING, "layer_types": ["full_attention", "sliding_attention"] * 2},
    _MIXTRAL,
    {**_MIXTRAL, "sliding_window": 100, "rope_theta": 10000.0},
    _GEMMA2,
    {**_GEMMA2, "sliding_window": 100, "head_dim": 32, "query_pre_attn_scalar": 100, "attn_logit_softcapping": None},
    {**_GEMMA2, "tie_word_embeddings": False, "final_logit_softcapping": 10.0},
    _GEMMA3,
    {**_GEMMA3, "sliding_window": 100, "sliding_window_pattern": 3, "rope_local_base_freq": 5000.0},
    {**_GEMMA3, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {
        **_GEMMA3,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
        },
    },
    _PHI3,
    {**_PHI3, "sliding_window": 100, "partial_rotary_factor": 0.75},
    {**_PHI3, "max_position_embeddings": 131072, "rope_scaling": {**_LONG, "type": "longrope"}},
    {
        **_PHI3,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {**_LONG, "type": "longrope"},
    },
)


def read_family_config(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a config.json of any family. Frequencies are those of short contexts and, where they
    differ, of contexts beyond the first training's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rotary, attention = model.model.rotary_emb, model.model.layers[0].self_attn
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    two = hasattr(rotary, "full_attention_inv_freq")
    whole = rotary.full_attention_inv_freq if two else rotary.inv_freq
    long = whole
    if getattr(rotary, "rope_type", "") == "longrope":
        rotary(torch.zeros(1), torch.tensor([[config.rope_parameters["original_max_position_embeddings"]]]))
        long = rotary.inv_freq
    return {
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": attention.head_dim,
        "norm_eps": config.rms_norm_eps,
        "max_position": config.max_position_embeddings,
        "windows": [window if kind == "sliding_attention" else 0 for kind in kinds],
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "scale": attention.scaling,
        "attention_softcap": getattr(attention, "attn_logit_softcapping", None) or 0.0,
        "final_softcap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "attention_factor": float(rotary.full_attention_attention_scaling if two else rotary.attention_scaling),
        "inv_freq": whole.tolist(),  # float32, written out exactly
        "long_inv_freq": long.tolist(),
        "local_inv_freq": rotary.sliding_attention_inv_freq.tolist() if two else None,
    }


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


def write_family_configs() -> None:
    cases = [json.dumps({"config": values, "read": read_family_config(values)}) for values in FAMILY_CONFIGS]
    made_with = json.dumps(f"transformers {transformers.__version__}")
    lines = ",\n".join(cases)
    (HERE / "family_configs.json").write_text(f'{{"made_with": {made_with}, "configs": [\n{lines}\n]}}\n')
    print(f"{len(FAMILY_CONFIGS)} configurations of families")


def main() -> None:
    if sys.argv[1:] == ["families"]:
        write_family_configs()
        return
    make_folders(sys.argv[1:] or FOLDERS)
    if sys.argv[1:]:
        return
    write_family_configs()
    cases = [json.dumps({"config": values, "read": read_config(values)}) for values in CONFIGS]
    made_with = json.dumps(f"transformers {transformers.__version__}")
    lines = ",\n".join(cases)
    (HERE / "huggingface_configs.json").write_text(f'{{"made_with": {made_with}, "configs": [\n{lines}\n]}}\n')
    print(f"{len(CONFIGS)} configurations")


if __name__ == "__main__":
    main()
