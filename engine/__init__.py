"""Seraph's engines: the native one for CPUs, and what every engine has in common.

The public names are loaded when they are first used, so that importing one module of this package costs no more than
that module.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.backends.base import Engine
    from engine.config import EngineConfig
    from engine.llm import LLM, Completion
    from engine.request import Request, SamplingParams, StructuredOutputs

__all__ = ["LLM", "Completion", "Engine", "EngineConfig", "Request", "SamplingParams", "StructuredOutputs"]

_HOMES = {
    "LLM": "engine.llm",
    "Completion": "engine.llm",
    "Engine": "engine.backends.base",
    "EngineConfig": "engine.config",
    "Request": "engine.request",
    "SamplingParams": "engine.request",
    "StructuredOutputs": "engine.request",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
