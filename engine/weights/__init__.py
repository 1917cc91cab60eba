"""Where weights come from: sources, checkpoint formats, and the packed file that a start maps."""

from engine.weights.inventory import InstalledModel, installed, remove, sweep, unfinished
from engine.weights.pack import PackedModel
from engine.weights.source import CatalogEntry, catalog, model_id, parse, resolve
from engine.weights.store import load_model

__all__ = [
    "CatalogEntry",
    "InstalledModel",
    "PackedModel",
    "catalog",
    "installed",
    "load_model",
    "model_id",
    "parse",
    "remove",
    "resolve",
    "sweep",
    "unfinished",
]
