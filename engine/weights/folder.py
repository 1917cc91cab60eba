"""A Hugging Face folder as a checkpoint: config.json, safetensors (whole or in shards), and the tokenizer's files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, SourceError
from engine.models.blueprint import Blueprint
from engine.models.registry import read_huggingface
from engine.weights.checkpoint import describe
from engine.weights.generation import defaults_from_config
from engine.weights.gguf_tokenizer import TokenizerInfo
from engine.weights.hf_tokenizer import read_tokenizer_folder
from engine.weights.modules import MODULE_FILES, read_modules
from engine.weights.safetensors import SafeTensor, SafetensorsFile
from engine.weights.strict_json import read_object

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

TEXT_FILES = (
    CONFIG,
    GENERATION_CONFIG,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *MODULE_FILES,
)
"""What is read of a folder beside its weights, where it is there."""

_MAX_NAME = 255  # bytes of a file's name, on every file system we know


class FolderCheckpoint:
    """See `engine.weights.checkpoint.Checkpoint`."""

    format_name = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = read_object(path / CONFIG)
        with ExitStack() as files:
            wanted = _weight_map(path)
            self._shard_of: dict[str, SafetensorsFile] = {}
            for name in _file_names(path, wanted):
                shard = SafetensorsFile(path / name)
                files.callback(shard.close)
                for tensor in shard.tensors:
                    if tensor in self._shard_of:
                        first = self._shard_of[tensor].path.name
                        raise FormatError(f"tensor {tensor[:100]!r} is also in {first}", path=shard.path)
                    self._shard_of[tensor] = shard
            _need_complete(path, wanted, self._shard_of)
            self._files = files.pop_all()
        self.tensors: Mapping[str, SafeTensor] = {name: shard.tensors[name] for name, shard in self._shard_of.items()}

    def blueprint(self) -> Blueprint[Any]:
        return read_huggingface(describe(self, self._config, partial(read_modules, self.path)))

    def text(self) -> TokenizerInfo:
        return read_tokenizer_folder(self.path)

    def generation_defaults(self) -> Mapping[str, float]:
        path = self.path / GENERATION_CONFIG
        return defaults_from_config(read_object(path), path) if path.exists() else {}

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return self._shard_of[name].read_rows(self.tensors[name], start, stop)

    def sha256(self) -> str:
        """Over the names and contents of `files_of`, in the order of names."""
        digest = hashlib.sha256()
        for path in files_of(self.path):
            try:
                with path.open("rb") as file:
                    name = path.relative_to(self.path).as_posix()
                    digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise SourceError(f"cannot read {path}: {error.strerror}.") from error
        return digest.hexdigest()

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> FolderCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder that is read, sorted: a change in one of them makes another model.

    Raises SourceError for a folder without weights, FormatError for an index that makes no sense.
    """
    weight_map = _weight_map(folder)
    names = {*TEXT_FILES, *_file_names(folder, weight_map), *([INDEX] if weight_map else [])}
    return [folder / name for name in sorted(names) if (folder / name).exists()]


def _weight_map(folder: Path) -> Mapping[str, str] | None:
    """Tensor -> file name, as the index of a sharded checkpoint says; None for weights in one file."""
    path = folder / INDEX
    if (folder / WHOLE).exists() or not path.exists():
        return None
    table = read_object(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FormatError("weight_map must be an object of tensor names and file names", path=path)
    for tensor, name in table.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise FormatError(
                f"weight_map[{tensor[:100]!r}] must be the name of a .safetensors file beside the index, found "
                f"{name!r}"[:300],
                path=path,
            )
    return table


def _is_plain(name: str) -> bool:
    """Whether a name from the index is one of a file in the same folder, and can be: no path, no control characters."""
    return (
        name.endswith(".safetensors")
        and PurePosixPath(name).name == name
        and name.isprintable()
        and len(name.encode()) <= _MAX_NAME
    )


def _file_names(folder: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    """The files that hold the weights, sorted."""
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    if (folder / WHOLE).exists():
        return [WHOLE]
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        there = f"found {', '.join(found[:5])} without an index" if found else _instead(folder)
        raise SourceError(f"{folder}: expected {WHOLE}, {INDEX} or one *.safetensors file, {there}.")
    return found


def _instead(folder: Path) -> str:
    """What a folder without safetensors holds in their place."""
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    return f"found {pickles[0]}: a pickle can run code, so none is read" if pickles else "found none"


def _need_complete(folder: Path, weight_map: Mapping[str, str] | None, found: Mapping[str, SafetensorsFile]) -> None:
    """Raise FormatError unless every tensor lies where the index says."""
    for tensor, name in (weight_map or {}).items():
        shard = found.get(tensor)
        if shard is None or shard.path.name != name:
            where = "nowhere" if shard is None else f"in {shard.path.name}"
            raise FormatError(f"tensor {tensor[:100]!r} must be in {name}, found {where}", path=folder / INDEX)
