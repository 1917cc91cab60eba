"""The golden SentencePiece vocabularies: as files, and as GGUF metadata."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.weights.sentencepiece_file import SentencePieceModel, read_model

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("llama", "defaults", "user_defined")


@cache
def golden() -> dict[str, Any]:
    """What SentencePiece and the published patterns make of tests/golden/texts.py."""
    loaded: dict[str, Any] = json.loads((GOLDEN / "vocabularies.json").read_text())
    return loaded


def model_path(name: str) -> Path:
    return GOLDEN / f"sentencepiece_{name}.model"


@cache
def model(name: str) -> SentencePieceModel:
    return read_model(model_path(name).read_bytes(), model_path(name))


def gguf_metadata(name: str, **changes: Any) -> dict[str, object]:
    """The vocabulary as a GGUF file's reader gives it, with `changes` to tokenizer.ggml (None: removed)."""
    vocabulary = model(name).vocabulary
    found: dict[str, object] = {
        "model": "llama",
        "tokens": list(vocabulary.tokens),
        "scores": np.array(vocabulary.scores, np.float32),
        "token_type": np.array(vocabulary.types, np.int32),
        "add_space_prefix": vocabulary.add_dummy_prefix,
        "remove_extra_whitespaces": vocabulary.remove_extra_whitespaces,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}
