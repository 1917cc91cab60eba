"""Checkpoints that another engine loads: where they lie, and what text and serving need of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import seraph_home
from engine.models.spec import ModelInfo, OpaqueSpec
from engine.weights.convert import convert, model_info
from engine.weights.export import export_folder, leftovers_beside, target_lock
from engine.weights.files import lock
from engine.weights.folder import CONFIG, FolderCheckpoint
from engine.weights.progress import NoProgress, Progress
from engine.weights.source import Source, entry_of, locate, parse
from engine.weights.store import packed_stem, split_packed_name
from engine.weights.strict_json import read_object

CONVERTED = "converted"
"""The folder under the cache folder that conversions go to."""

_ENCODERS = ("Model", "ForMaskedLM", "ForSequenceClassification")
"""How the names of architectures end that make vectors, not text."""


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A Hugging Face folder. Its weights were not read."""

    name: str
    folder: Path
    info: ModelInfo[Any]
    nbytes: int  # of the weights

    def close(self) -> None:
        """Nothing is held, as a PackedModel's weights are."""


def describe_model(source: str, *, home: Path | None = None, progress: Progress | None = None) -> DescribedModel:
    """The model that `source` names, after fetching it where that has not happened yet.

    A GGUF file is converted once, to a folder under `home`. A decoder may be of a family that we do not compute. Raises
    SourceError, FormatError or UnsupportedModelError.
    """
    parsed, progress = parse(source), progress or NoProgress()
    path = locate(parsed, seraph_home(home), progress).path
    if not path.is_dir():
        path = _converted(parsed, source, seraph_home(home), progress)
    with FolderCheckpoint(path) as checkpoint:
        info = _info(checkpoint)
        nbytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    entry = entry_of(parsed)
    if entry is not None and entry.generation:
        info = dataclasses.replace(info, generation_defaults={**info.generation_defaults, **entry.generation})
    return DescribedModel(parsed.name, path, info, nbytes)


def converted(home: Path) -> Iterator[tuple[str, str, Path]]:
    """The folders that GGUF models were converted to: of each its stem, as of packed files, its model and itself."""
    for path in sorted((home / CONVERTED).glob("*")):
        parts = split_packed_name(f"{path.name}.seraph")
        if parts is not None and parts[0] == path.name and path.is_dir():
            yield path.name, parts[1], path


def forget_converted(stem: str, home: Path) -> int:
    """Remove the folder of that stem, and what killed conversions left of it; returns the bytes freed."""
    folder, freed = (home / CONVERTED / stem).resolve(), 0
    with lock(target_lock(folder, home), f"removing {folder}"):
        for path in (folder, *leftovers_beside(folder)):
            if path.is_dir():
                freed += folder_bytes(path)
                shutil.rmtree(path)
    return freed


def folder_bytes(folder: Path) -> int:
    """Of the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _converted(parsed: Source, source: str, home: Path, progress: Progress) -> Path:
    folder = home / CONVERTED / packed_stem(parsed.name, parsed.origin)
    return folder if folder.exists() else export_folder(source, folder, home=home, progress=progress)


def _info(checkpoint: FolderCheckpoint) -> ModelInfo[Any]:
    config = read_object(checkpoint.path / CONFIG)
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name.endswith(_ENCODERS):
        return convert(checkpoint)[0]
    text = checkpoint.text()
    types = sorted({tensor.type_name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2})
    spec = OpaqueSpec(str(config.get("model_type", "")), text.vocab_size)
    return model_info(checkpoint, spec, text, "/".join(types))
