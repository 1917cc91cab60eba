"""A model as a Hugging Face folder, which vLLM and transformers load: `seraph convert`.

What a family's file says of a folder is said for reading one; here it is read backwards. Two recipes, one from the
checkpoint and one from the folder, make the same tensor of ours, so each row of the folder's tensors is found in the
checkpoint's.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from engine.config import FOLDER_DTYPES, seraph_home
from engine.errors import ConfigError, FormatError, UnsupportedModelError
from engine.kernels.layout import to_bf16
from engine.models.recipe import Recipe
from engine.models.registry import as_huggingface
from engine.models.spec import ModelInfo
from engine.weights.checkpoint import describe, read_vector
from engine.weights.convert import CHUNK_VALUES, MAX_BF16, convert
from engine.weights.files import free_bytes, lock, need_space, publish, writing
from engine.weights.folder import CONFIG, GENERATION_CONFIG, INDEX, WHOLE
from engine.weights.generation import config_from_defaults
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.progress import NoProgress, Progress
from engine.weights.safetensors import encode_header
from engine.weights.source import FileSource, Source, entry_of, locate, parse
from engine.weights.store import lock_path, packed_stem
from engine.weights.tensor_types import FLOAT_TYPES

SHARD_BYTES = 5 * 10**9
"""Weights of one file; what transformers once made the custom."""


@dataclass(frozen=True, slots=True)
class _Dtype:
    """A type that weights are stored in."""

    stored: str  # as safetensors names it
    nbytes: int
    largest: float
    round: Callable[[NDArray[np.float32]], NDArray[np.generic]]


_DTYPES: Mapping[str, _Dtype] = {
    "bfloat16": _Dtype("BF16", 2, MAX_BF16, to_bf16),
    "float16": _Dtype("F16", 2, float(np.finfo(np.float16).max), lambda values: values.astype("<f2")),
    "float32": _Dtype("F32", 4, float(np.finfo(np.float32).max), lambda values: values.astype("<f4", copy=False)),
}
assert tuple(_DTYPES) == FOLDER_DTYPES


def export_folder(
    source: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    force: bool = False,
    home: Path | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    free: Callable[[Path], int] = free_bytes,
) -> Path:
    """Write the model that `source` names, fetched first where it has to be, as the Hugging Face folder `folder`.

    Weights are dequantized to float32 and rounded to `dtype`, one of FOLDER_DTYPES, once. The folder is complete or
    absent: it is written beside its place and renamed. `force` replaces one that is there, if it is a model's. Returns
    its path.

    Raises ConfigError for a dtype or place that cannot be, SourceError or FormatError as `load_packed` does, and
    UnsupportedModelError for what is no GGUF file of a decoder, or of one that a folder cannot describe.
    """
    if dtype not in FOLDER_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(FOLDER_DTYPES)}, got {dtype!r}.")
    root, target = seraph_home(home), folder.expanduser().resolve()
    progress = progress or NoProgress()
    _need_place(target, force)
    parsed = parse(source)
    with _opened(parsed, target, root, progress) as checkpoint:
        info, _ = convert(checkpoint)  # which refuses what we cannot compute with
        entry = entry_of(parsed)
        defaults = {**info.generation_defaults, **(entry.generation if entry is not None else {})}
        config, there = as_huggingface(describe(checkpoint, checkpoint.metadata))
        texts = _texts(info, config, defaults, checkpoint, dtype)
        tensors = _tensors(checkpoint, checkpoint.blueprint().recipes, there.recipes)
        shards = _shards(tensors, _DTYPES[dtype].nbytes, shard_bytes)
        if len(shards) > 1:
            texts[INDEX] = _index(shards, _DTYPES[dtype].nbytes)
        nbytes = _DTYPES[dtype].nbytes * sum(tensor.size for tensor in tensors)
        purpose = f"converting {parsed.name}"
        with (
            lock(target_lock(target, root), f"writing {target}"),
            _beside(target, force, nbytes + sum(map(len, texts.values())), purpose, free) as temporary,
        ):
            for name, text in texts.items():
                _write(temporary / name, [text])
            progress.start(f"Converting {parsed.name}", nbytes)
            try:
                for name, held in shards.items():
                    _write(temporary / name, _shard(held, _DTYPES[dtype], dtype, progress))
            finally:
                progress.done()
    return target


def target_lock(target: Path, home: Path) -> Path:
    """The lock that whoever writes or removes the folder `target`, a resolved path, holds."""
    return home / "packed" / f"{packed_stem(target.name, str(target))}.lock"


def leftovers_beside(target: Path) -> list[Path]:
    """What killed conversions left of the folder `target`, for the holder of its lock."""
    leftover = re.compile(rf"{re.escape(target.name)}\.\d+(\.old)?\.tmp")
    if not target.parent.is_dir():
        return []
    return [path for path in target.parent.iterdir() if leftover.fullmatch(path.name)]


def _need_place(target: Path, force: bool) -> None:
    """Raise ConfigError for a place where something is, unless it may be replaced and is a model's folder."""
    if not target.exists():
        return
    if not force:
        raise ConfigError(f"{target} exists already: name another folder, or replace it with --force.")
    if not target.is_dir() or not ((target / CONFIG).exists() or next(target.iterdir(), None) is None):
        raise ConfigError(f"{target} is no model's folder, which is all that --force replaces: remove it yourself.")


@contextmanager
def _opened(source: Source, target: Path, home: Path, progress: Progress) -> Iterator[GgufCheckpoint]:
    if isinstance(source, FileSource) and source.path.suffix == ".seraph":
        raise UnsupportedModelError(f"{source.path} is packed for Seraph: name the checkpoint that it was made from.")
    with lock(lock_path(source, home), f"fetching {source.name}"):  # a removal takes it too
        path = locate(source, home, progress).path
        if path.is_dir():
            raise UnsupportedModelError(f"{source.name} needs no conversion: it is a Hugging Face folder, {path}.")
        if path.resolve().is_relative_to(target):
            raise ConfigError(f"{path} lies in {target}, which would be replaced: name another folder.")
        checkpoint = GgufCheckpoint(path)
    with checkpoint:
        yield checkpoint


@contextmanager
def _beside(target: Path, force: bool, num_bytes: int, purpose: str, free: Callable[[Path], int]) -> Iterator[Path]:
    """A new folder beside `target`, for `num_bytes`, which takes its place in the end; on failure nothing is left of
    it. The caller holds the target's lock."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    replaced = target.with_name(f"{target.name}.{os.getpid()}.old.tmp")
    _need_place(target, force)  # again: somebody else may have held the lock
    with writing(target.parent, num_bytes, purpose):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Whoever wrote these was killed: the lock that we hold was theirs.
        for path in leftovers_beside(target):
            shutil.rmtree(path)
        need_space(target.parent, num_bytes, purpose, free=free)
        try:
            temporary.mkdir()
            yield temporary
            _need_place(target, force)  # again: this may have taken an hour
            if target.exists():
                os.replace(target, replaced)
            publish(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if not target.exists() and replaced.exists():
                os.replace(replaced, target)
            shutil.rmtree(replaced, ignore_errors=True)


def _write(path: Path, pieces: Sequence[bytes] | Iterator[bytes]) -> None:
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the folder. `origins` are tensors of ours that it is a part of, each with its recipe from the
    checkpoint and that from the folder."""

    checkpoint: GgufCheckpoint
    name: str
    shape: tuple[int, ...]
    origins: list[tuple[Recipe, Recipe]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def chunks(self) -> Iterator[NDArray[np.float32]]:
        """Its values in order, float32, a few MB at a time."""
        sources, source_of, row_of = self._rows()
        if len(self.shape) == 1:
            values = np.empty(self.shape, np.float32)
            for i, (name, plus) in enumerate(sources):
                values[source_of == i] = read_vector(self.checkpoint, name)[row_of[source_of == i]] + np.float32(plus)
            yield values
            return
        width = self.shape[-1]
        step = max(1, CHUNK_VALUES // width)
        for start in range(0, len(row_of), step):
            chunk_of, rows = source_of[start : start + step], row_of[start : start + step]
            values = np.empty((len(rows), width), np.float32)
            for i in np.unique(chunk_of).tolist():
                chosen = chunk_of == i
                # Rows move within a head only: what is read is little more than what is taken.
                first, last = int(rows[chosen].min()), int(rows[chosen].max())
                values[chosen] = self._read(sources[i][0], first, last + 1)[rows[chosen] - first]
            yield values

    def _rows(self) -> tuple[list[tuple[str, float]], NDArray[np.int64], NDArray[np.int64]]:
        """Where each row (of a vector, value) comes from: tensors of the checkpoint with what is added to them, index
        of the tensor int64 [n], row within that tensor int64 [n]."""
        num_rows = math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]
        sources: list[tuple[str, float]] = []
        source_of, row_of = np.full(num_rows, -1), np.zeros(num_rows, np.int64)
        for origin, target in self.origins:
            from_part, from_row = origin.rows()
            to_part, to_row = target.rows()
            for i, here in enumerate(origin.parts):
                for j, there in enumerate(target.parts):
                    if there.tensor != self.name:
                        continue
                    both = (from_part == i) & (to_part == j)
                    source_of[to_row[both]], row_of[to_row[both]] = len(sources), from_row[both]
                    sources.append((here.tensor, here.plus - there.plus))
        assert (source_of >= 0).all(), self.name
        return sources, source_of, row_of

    def _read(self, name: str, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) of a matrix of the checkpoint. Raises FormatError for a value that is not finite."""
        raw, type_name = self.checkpoint.read_rows(name, first, last), self.checkpoint.tensors[name].type_name
        decode = FLOAT_TYPES.get(type_name)
        with np.errstate(all="ignore"):
            values = decode(raw) if decode is not None else dequantize(raw, GGMLQuantizationType[type_name])
        if not np.isfinite(values).all():
            raise FormatError(f"tensor {name} holds a value that is not finite", path=self.checkpoint.path)
        return values


def _tensors(checkpoint: GgufCheckpoint, origins: Sequence[Recipe], targets: Sequence[Recipe]) -> list[_Tensor]:
    """The tensors of the folder, in the order in which they are first needed."""
    by_name = {recipe.name: recipe for recipe in origins}
    found: dict[str, _Tensor] = {}
    for target in targets:
        for name, shape in {part.tensor: part.stored_shape for part in target.parts}.items():
            found.setdefault(name, _Tensor(checkpoint, name, shape, [])).origins.append((by_name[target.name], target))
    return list(found.values())


def _shards(tensors: Sequence[_Tensor], item_bytes: int, most: int) -> dict[str, list[_Tensor]]:
    """Tensors by the file that holds them: of at most `most` bytes, if no single one is larger."""
    groups: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and item_bytes * (tensor.size + sum(one.size for one in groups[-1])) > most:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": held for i, held in enumerate(groups, start=1)}


def _shard(tensors: Sequence[_Tensor], dtype: _Dtype, dtype_name: str, progress: Progress) -> Iterator[bytes]:
    """The bytes of a file. Raises ConfigError for a value that is too large for the dtype."""
    yield encode_header((tensor.name, dtype.stored, tensor.shape) for tensor in tensors)
    for tensor in tensors:
        for values in tensor.chunks():
            largest = float(np.abs(values).max())
            if largest > dtype.largest:
                raise ConfigError(
                    f"dtype {dtype_name} holds values of at most {dtype.largest:.5g}, and {tensor.name} has "
                    f"{largest:.5g}: take another."
                )
            stored = dtype.round(values)
            yield stored.tobytes()
            progress.advance(stored.nbytes)


def _index(shards: Mapping[str, list[_Tensor]], item_bytes: int) -> bytes:
    total = item_bytes * sum(tensor.size for held in shards.values() for tensor in held)
    weight_map = {tensor.name: file for file, held in shards.items() for tensor in held}
    return _json({"metadata": {"total_size": total}, "weight_map": weight_map})


def _texts(
    info: ModelInfo,
    config: Mapping[str, object],
    defaults: Mapping[str, float],
    checkpoint: GgufCheckpoint,
    dtype: str,
) -> dict[str, bytes]:
    """The files beside the weights."""
    tokenizer = Tokenizer.from_str(info.tokenizer_json)
    ids = {
        "bos": info.bos_token_id,
        "eos": next(iter(info.eos_token_ids), None),
        "pad": _named(checkpoint, "padding_token_id"),
        "unk": _named(checkpoint, "unknown_token_id"),
    }
    tokens = {name: tokenizer.id_to_token(token_id) for name, token_id in ids.items() if token_id is not None}
    if info.add_bos:
        bos = tokens["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, info.bos_token_id)]
        )
    named = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}  # null: none, not the class's own
    return {
        CONFIG: _json(
            {
                **config,
                **named,
                "torch_dtype": dtype,
                # Without it transformers 5 takes every large tokenizer for one of Mistral's that has to be mended.
                "transformers_version": "5.0.0",
            }
        ),
        GENERATION_CONFIG: _json(
            {**named, "eos_token_id": list(info.eos_token_ids) or None, **config_from_defaults(defaults)}
        ),
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",  # the one that takes tokenizer.json as it is
                **{f"{name}_token": token for name, token in tokens.items()},
                "add_bos_token": info.add_bos,
                "clean_up_tokenization_spaces": False,
                "model_max_length": info.spec.max_position,
                **({} if info.chat_template is None else {"chat_template": info.chat_template}),
            }
        ),
    }


def _named(checkpoint: GgufCheckpoint, key: str) -> int | None:
    """A token that the tokenizer's metadata name, and that we do not need ourselves."""
    value = checkpoint.metadata.get(f"tokenizer.ggml.{key}")
    tokens = checkpoint.metadata.get("tokenizer.ggml.tokens")
    known = isinstance(value, int) and isinstance(tokens, list) and 0 <= value < len(tokens)
    return value if known and isinstance(value, int) else None


def _json(values: Mapping[str, object]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
