"""A GGUF file as a Hugging Face folder in bfloat16: `python make_folder.py FILE.gguf FOLDER`.

Runs inside vLLM's environment, which has torch and transformers; transformers itself reads the file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(source: Path, folder: Path) -> None:
    where = {"gguf_file": source.name, "local_files_only": True}
    floats = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.bfloat16, quantization_config=floats, **where
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
