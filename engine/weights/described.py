"""Checkpoints that another engine loads: where they lie, and what text and serving need of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import seraph_home
from engine.models.spec import ModelInfo, OpaqueSpec
from engine.weights.convert import convert
from engine.weights.export import export_folder
from engine.weights.folder import CONFIG, FolderCheckpoint
from engine.weights.progress import NoProgress, Progress
from engine.weights.source import Source, entry_of, locate, parse
from engine.weights.store import packed_stem
from engine.weights.strict_json import read_object

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


def _converted(parsed: Source, source: str, home: Path, progress: Progress) -> Path:
    folder = home / "converted" / packed_stem(parsed.name, parsed.origin)
    return folder if folder.exists() else export_folder(source, folder, home=home, progress=progress)


def _info(checkpoint: FolderCheckpoint) -> ModelInfo[Any]:
    config = read_object(checkpoint.path / CONFIG)
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name.endswith(_ENCODERS):
        return convert(checkpoint)[0]
    text = checkpoint.text()
    types = sorted({tensor.type_name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2})
    return ModelInfo(
        spec=OpaqueSpec(str(config.get("model_type", "")), text.vocab_size),
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        add_bos=text.add_bos,
        special_token_ids=text.special_token_ids,
        checkpoint_format=f"{'/'.join(types)} {checkpoint.format_name}",
        generation_defaults=checkpoint.generation_defaults(),
    )
