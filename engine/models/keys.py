"""Typed access to a checkpoint's configuration, whichever format it has: a value that is missing, of another kind or
out of range becomes UnsupportedModelError with the key, what it must be and what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from engine.errors import UnsupportedModelError

MAX_COUNT = (1 << 31) - 1
"""No size of a model is larger, and every product of two of them still fits 64 bits."""


class Keys:
    """A configuration whose keys all begin with `prefix`. A key whose value is None counts as missing."""

    def __init__(self, values: Mapping[str, object], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> object:
        return self._values.get(self._prefix + key)

    def name(self, key: str) -> str:
        """The key as the checkpoint has it."""
        return self._prefix + key

    def count(self, key: str, default: int | None = None, *, least: int = 0, most: int = MAX_COUNT) -> int:
        """An integer from `least` to `most`; an array with one value for each layer where all are equal."""
        value = self._need(key, default)
        if isinstance(value, np.ndarray) and value.ndim == 1 and len(value) and bool((value == value[0]).all()):
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, f"one integer from {least} to {most}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._need(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_COUNT:
            value = float(value)
        if not isinstance(value, float) or not 0.0 < value < math.inf:
            raise self.error(key, "a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._need(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._need(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def table(self, key: str) -> Mapping[str, object]:
        """A configuration within this one, empty where there is none."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return value

    def neutral(self, key: str, *allowed: object) -> None:
        """Raise unless the key is missing or has one of the values under which it changes nothing."""
        value = self.get(key)
        if value is not None and (isinstance(value, (list, dict, np.ndarray)) or value not in allowed):
            wanted = " or ".join(map(repr, allowed)) or "absent"
            raise UnsupportedModelError(
                f"{self.name(key)} must be {wanted}, the checkpoint has {shown(value)}: it is not supported."
            )

    def error(self, key: str, expected: str) -> UnsupportedModelError:
        """What to raise where the value of a key is not what it must be."""
        return UnsupportedModelError(f"{self.name(key)} must be {expected}, got {shown(self.get(key))}.")

    def _need(self, key: str, default: object) -> object:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise UnsupportedModelError(f"the checkpoint's configuration lacks {self.name(key)}.")
        return value


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number that is too long to show"
    return text if len(text) <= 100 else text[:97] + "..."
