from __future__ import annotations

import pytest

from engine.config import DEFAULT_MODEL
from engine.weights import PackedModel, load_model


@pytest.fixture(scope="session")
def default_model() -> PackedModel:
    """The default model's packed file, mapped; fetched into the models' folder the first time."""
    return load_model(DEFAULT_MODEL)
