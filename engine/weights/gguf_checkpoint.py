"""A GGUF file as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UnsupportedModelError
from engine.models.blueprint import Blueprint
from engine.models.registry import read_gguf
from engine.weights.checkpoint import describe
from engine.weights.generation import defaults_from_gguf
from engine.weights.gguf import GgufFile, GgufTensor
from engine.weights.gguf_tokenizer import TokenizerInfo, read_tokenizer


class GgufCheckpoint:
    """See `engine.weights.checkpoint.Checkpoint`."""

    format_name = "GGUF"

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.path = path

    @property
    def tensors(self) -> Mapping[str, GgufTensor]:
        return self._file.tensors

    @property
    def metadata(self) -> Mapping[str, object]:
        return self._file.metadata

    def blueprint(self) -> Blueprint[Any]:
        metadata = self._file.metadata
        pieces = metadata.get("split.count")  # of llama.cpp's gguf-split
        if isinstance(pieces, int) and pieces > 1:
            raise UnsupportedModelError(
                f"GGUF checkpoints split over several files are not supported (split.count {pieces}): merge them first."
            )
        return read_gguf(describe(self, metadata))

    def text(self) -> TokenizerInfo:
        return read_tokenizer(self._file.metadata, self.path)

    def generation_defaults(self) -> Mapping[str, float]:
        return defaults_from_gguf(self._file.metadata, self.path)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        return self._file.read_rows(self.tensors[name], start, stop)

    def sha256(self) -> str:
        return self._file.sha256()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
