"""A Hugging Face folder as a checkpoint: config.json, safetensors (whole or in shards), and the tokenizer's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, SourceError
from engine.models.blueprint import Blueprint, Description
from engine.models.registry import read_huggingface
from engine.weights.checkpoint import read_vector
from engine.weights.generation import defaults_from_config
from engine.weights.gguf_tokenizer import TokenizerInfo
from engine.weights.hf_tokenizer import read_tokenizer_folder
from engine.weights.safetensors import SafeTensor, SafetensorsFile

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
MAX_JSON_BYTES = 64 << 20


class FolderCheckpoint:
    """See `engine.weights.checkpoint.Checkpoint`."""

    format_name = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = read_json(path / "config.json")
        self._files: list[SafetensorsFile] = []
        self._of: dict[str, SafetensorsFile] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            wanted = _weight_map(path)
            for name in _file_names(path, wanted):
                file = SafetensorsFile(path / name)
                self._files.append(file)
                for tensor in file.tensors:
                    if tensor in self._of:
                        raise FormatError(f"tensor {tensor!r} is also in {self._of[tensor].path.name}", path=file.path)
                    self._of[tensor] = file
            _need_complete(path, wanted, self._of)
            undo.pop_all()
        self.tensors: Mapping[str, SafeTensor] = {name: file.tensors[name] for name, file in self._of.items()}

    def blueprint(self) -> Blueprint:
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        return read_huggingface(Description(self._config, shapes, partial(read_vector, self)))

    def text(self) -> TokenizerInfo:
        return read_tokenizer_folder(self.path)

    def generation_defaults(self) -> Mapping[str, float]:
        path = self.path / "generation_config.json"
        return defaults_from_config(read_json(path), path) if path.exists() else {}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return self._of[name].read_rows(self.tensors[name], start, stop)

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(files_of(self.path)):
            with path.open("rb") as file:
                digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> FolderCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What is read of a folder beside its weights, where it is there."""


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder that is read: a change in one of them makes another model.

    Raises SourceError for a folder without weights, FormatError for an index that makes no sense.
    """
    names = [*TEXT_FILES, INDEX, *_file_names(folder, _weight_map(folder))]
    return [folder / name for name in names if (folder / name).exists()]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object in a file of bounded size. Raises SourceError or FormatError."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise FormatError(f"expected at most {MAX_JSON_BYTES} bytes, the file has {size}", path=path)
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}", path=path, offset=getattr(error, "pos", None)) from None
    if not isinstance(values, dict):
        raise FormatError(f"expected a JSON object, found {type(values).__name__}", path=path)
    return values


def _weight_map(folder: Path) -> Mapping[str, str] | None:
    """Tensor -> file name, as the index of a sharded checkpoint says; None where there is no index."""
    path = folder / INDEX
    if not path.exists():
        return None
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError("weight_map must be an object of tensor names and file names", path=path)
    for tensor, name in table.items():
        plain = isinstance(name, str) and name.endswith(".safetensors") and PurePosixPath(name).name == name
        if not plain:
            raise FormatError(f"weight_map[{tensor!r}] must be a plain *.safetensors name, found {name!r}", path=path)
    return table


def _file_names(folder: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    if (folder / WHOLE).exists():
        return [WHOLE]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        there = f"found {', '.join(found[:5])} without an index" if found else "found none"
        raise SourceError(f"{folder}: expected {WHOLE}, {INDEX} or one *.safetensors file, {there}.")
    return found


def _need_complete(folder: Path, weight_map: Mapping[str, str] | None, found: Mapping[str, SafetensorsFile]) -> None:
    for tensor, name in (weight_map or {}).items():
        file = found.get(tensor)
        if file is None or file.path.name != name:
            where = "nowhere" if file is None else file.path.name
            raise FormatError(f"tensor {tensor!r} must be in {name}, found {where}", path=folder / INDEX)
