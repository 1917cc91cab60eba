"""Where weights come from: sources, checkpoint formats, and the packed file that a start maps.

What names sources is at hand at once: a shell that completes a word asks for it. What reads weights needs numpy, and is
loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from engine.weights.source import CatalogEntry, catalog, known, model_id, parse, resolve

if TYPE_CHECKING:
    from engine.weights.export import export_folder
    from engine.weights.inventory import InstalledModel, installed, remove, sweep, unfinished
    from engine.weights.pack import PackedModel
    from engine.weights.store import load_encoder, load_model, load_packed

__all__ = [
    "CatalogEntry",
    "InstalledModel",
    "PackedModel",
    "catalog",
    "export_folder",
    "installed",
    "known",
    "load_encoder",
    "load_model",
    "load_packed",
    "model_id",
    "parse",
    "remove",
    "resolve",
    "sweep",
    "unfinished",
]

_HOMES = {
    "InstalledModel": "engine.weights.inventory",
    "PackedModel": "engine.weights.pack",
    "export_folder": "engine.weights.export",
    "installed": "engine.weights.inventory",
    "load_encoder": "engine.weights.store",
    "load_model": "engine.weights.store",
    "load_packed": "engine.weights.store",
    "remove": "engine.weights.inventory",
    "sweep": "engine.weights.inventory",
    "unfinished": "engine.weights.inventory",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine.weights' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
