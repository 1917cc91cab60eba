"""What sentence-transformers writes beside a checkpoint: how the rows of its encoder become one vector.

`modules.json` lists the stages of a model: the encoder, then pooling, then, for most, a normalization. The file of a
stage lies in a folder of its own. Format: the library's own documentation and its `models` package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from engine.errors import FormatError, UnsupportedModelError
from engine.models.blueprint import Modules
from engine.models.keys import Keys, shown
from engine.weights.strict_json import read_bounded, read_object

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
LENGTH = "sentence_bert_config.json"

MODULE_FILES = (MODULES, POOLING, LENGTH)

_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_PREFIX = "pooling_mode_"


def read_modules(folder: Path) -> Modules | None:
    """What the files say; None where there are none. Raises FormatError, or UnsupportedModelError for other stages."""
    path = folder / MODULES
    if not path.exists():
        return None
    kinds, folders = [], []
    for stage in _read_list(path):
        kind, place = (stage.get(key) for key in ("type", "path")) if isinstance(stage, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str):
            raise FormatError(f"expected objects with a type and a path, found {shown(stage)}", path=path)
        kinds.append(kind.rpartition(".")[2])
        folders.append(place)
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedModelError(
            f"{path}: the stages must be Transformer, Pooling and perhaps Normalize, found {shown(kinds)}."
        )
    if folders[1] != os.path.dirname(POOLING):
        raise UnsupportedModelError(
            f"{path}: pooling must lie in {os.path.dirname(POOLING)}, found {shown(folders[1])}."
        )
    return Modules(_pooling(folder / POOLING), kinds[-1] == "Normalize", _max_length(folder / LENGTH))


def _pooling(path: Path) -> str:
    values = read_object(path)
    mode = values.get("pooling_mode")
    modes = (
        {mode} if isinstance(mode, str) else {key for key in values if key.startswith(_PREFIX) and values[key] is True}
    )
    found = {_MODES.get(str(mode), str(mode)) for mode in modes}
    if len(found) != 1 or not found <= set(_MODES.values()):
        raise UnsupportedModelError(f"{path}: pooling must be mean or cls, found {shown(sorted(found))}.")
    return found.pop()


def _max_length(path: Path) -> int | None:
    if not path.exists():
        return None
    keys = Keys(read_object(path))
    return None if keys.get("max_seq_length") is None else keys.count("max_seq_length", least=1)


def _read_list(path: Path) -> list[object]:
    """The JSON array in a file, of bounded size."""
    try:
        values = json.loads(read_bounded(path).decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", path=path) from None
    if not isinstance(values, list):
        raise FormatError(f"must be a JSON array, found {type(values).__name__}", path=path)
    return values
