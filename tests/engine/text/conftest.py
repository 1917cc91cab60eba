from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.text import Tokenizer
from engine.weights import PackedModel

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenizer_smollm2.json"


@pytest.fixture(scope="session")
def smollm2(default_model: PackedModel) -> Tokenizer:
    """The default model's tokenizer."""
    return Tokenizer.from_info(default_model.info)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """What transformers makes of tests/golden/texts.py."""
    loaded: dict[str, Any] = json.loads(GOLDEN.read_text())
    return loaded
