"""What a checkpoint says of how it wants to be sampled: generation_config.json, or GGUF's `general.sampling` keys."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from engine.errors import FormatError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Key:
    """One value that we know: its name in the API, what it may be, and the value that says "off"."""

    name: str
    allowed: str
    ok: Callable[[float], bool]
    whole: bool = False
    off: float | None = None  # left out: the API's own default says the same


_KEYS: Mapping[str, _Key] = {
    "temperature": _Key("temperature", "a number from 0 to 2", lambda v: 0 <= v <= 2),
    "top_p": _Key("top_p", "a number above 0, at most 1", lambda v: 0 < v <= 1),
    "min_p": _Key("min_p", "a number from 0 to 1", lambda v: 0 <= v <= 1),
    "top_k": _Key("top_k", "a whole number from -1 up", lambda v: v >= -1, whole=True, off=0),
    "repetition_penalty": _Key("repetition_penalty", "a number above 0, at most 10", lambda v: 0 < v <= 10),
    "presence_penalty": _Key("presence_penalty", "a number from -2 to 2", lambda v: -2 <= v <= 2),
    "frequency_penalty": _Key("frequency_penalty", "a number from -2 to 2", lambda v: -2 <= v <= 2),
    "max_new_tokens": _Key("max_tokens", "a whole number from 1 up", lambda v: v >= 1, whole=True),
}
"""generation_config.json's keys that the API has a name for. The others, dozens of them, steer other machinery."""

_GGUF_KEYS: Mapping[str, str] = {
    "temp": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "top_k": "top_k",
    "penalty_repeat": "repetition_penalty",
}

_SEARCH: Mapping[str, tuple[object, ...]] = {
    # Ways of decoding that we do not have, with the values under which they are off.
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
}


def defaults_from_config(values: Mapping[str, object], path: Path | str) -> dict[str, float]:
    """The defaults that a generation_config.json states, by the API's names.

    `do_sample` false is temperature 0. Ways of decoding that we do not have are logged. Raises FormatError naming
    `path` and the key for a value that cannot be.
    """
    found = _known(values, {key: key for key in _KEYS}, "", path)
    samples = values.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise FormatError(f"do_sample must be true or false, found {samples!r}", path=path)
    if samples is False:
        found["temperature"] = 0.0
    for key, off in _SEARCH.items():
        value = values.get(key)
        if value is not None and value not in off:
            logger.warning("%s: %s %r is not implemented and has no effect", path, key, value)
    return found


def config_from_defaults(defaults: Mapping[str, float]) -> dict[str, object]:
    """The keys of a generation_config.json that states `defaults`, which are by the API's names."""
    found: dict[str, object] = {
        key: int(value) if known.whole else value
        for key, known in _KEYS.items()
        if (value := defaults.get(known.name)) is not None
    }
    if found.get("temperature") == 0:
        return {"do_sample": False} | {key: value for key, value in found.items() if key != "temperature"}
    return {"do_sample": True, **found} if found else {}


def defaults_from_gguf(metadata: Mapping[str, object], path: Path) -> dict[str, float]:
    """The same from GGUF metadata, which name the file's keys in their own way."""
    return _known(metadata, _GGUF_KEYS, "general.sampling.", path)


def _known(values: Mapping[str, object], names: Mapping[str, str], prefix: str, path: Path | str) -> dict[str, float]:
    found: dict[str, float] = {}
    for stored, name in names.items():
        value = values.get(prefix + stored)
        if value is None:
            continue
        key = _KEYS[name]
        if not _is_number(value) or not key.ok(value) or (key.whole and value != int(value)):
            raise FormatError(f"{prefix}{stored} must be {key.allowed}, found {value!r}"[:300], path=path)
        if value != key.off:
            found[key.name] = int(value) if key.whole else float(value)
    return found


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max
