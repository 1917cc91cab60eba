"""From a checked checkpoint to what is packed: a family's recipes, carried out a few MB at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import QUANTIZATIONS
from engine.errors import ConfigError, FormatError, UnsupportedModelError
from engine.kernels.layout import GROUP, STRIP, Correction, MatrixFormat, pack_bf16, pack_matrix, to_bf16
from engine.models.recipe import Part, Recipe
from engine.models.spec import ModelInfo
from engine.weights.checkpoint import Checkpoint, StoredTensor, read_vector
from engine.weights.gguf_tokenizer import TokenizerInfo
from engine.weights.pack import TensorWriter
from engine.weights.quantize import FLOAT_CORRECTION, MAX_QUANTIZED, quantize
from engine.weights.tensor_types import FLOAT_TYPES, QUANTIZED_TYPES, Quantized

CHUNK_VALUES = 1 << 20
"""Weights converted at a time, which takes about 30 bytes of memory each; a chunk is whole strips, and at least one."""

_VOCABULARY = frozenset({"embed", "head"})
"""Tensors that "int4" leaves at 8 bits: every token passes through them, and their rows decide near ties."""

_ROUTER = "router"
"""What stays bfloat16: a rounded logit may choose another expert, and next to nothing is saved."""

MAX_BF16 = (2 - 2**-7) * 2.0**127
"""The largest finite bfloat16."""


def convert(checkpoint: Checkpoint, *, quantization: str | None = None) -> tuple[ModelInfo[Any], list[TensorWriter]]:
    """What `checkpoint` holds, and its tensors ready to be packed (their bytes are read when a chunk is asked for).

    `quantization` says what becomes of float matrices: "none" (the same as None where all of them are float) keeps
    them as bfloat16, "int8" and "int4" quantize them. Matrices that are stored quantized stay as they are. Raises
    UnsupportedModelError for what we do not implement, FormatError for a checkpoint that contradicts itself,
    ConfigError for a quantization that does not go with what is stored.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    blueprint = checkpoint.blueprint()
    spec = blueprint.spec
    # A tensor that no recipe uses would be left out of the arithmetic, and the answer would be another model's.
    used = {part.tensor for recipe in blueprint.recipes for part in recipe.parts} | blueprint.ignored
    unused = checkpoint.tensors.keys() - used
    if unused:
        raise UnsupportedModelError(f"{spec.family}: tensors that are not supported: {', '.join(sorted(unused)[:5])}.")
    stored = {recipe.name: [_stored(checkpoint, part) for part in recipe.parts] for recipe in blueprint.recipes}
    matrices = [tensor for recipe in blueprint.recipes for tensor in stored[recipe.name] if len(recipe.shape) == 2]
    _need_quantization(checkpoint, matrices, quantization)
    text = checkpoint.text()
    if text.vocab_size > spec.vocab_size:
        raise FormatError(
            f"the tokenizer has {text.vocab_size} tokens, the embedding {spec.vocab_size} rows", path=checkpoint.path
        )
    info = model_info(checkpoint, spec, text, _main_type(matrices))
    return info, [_writer(checkpoint, recipe, stored[recipe.name], quantization) for recipe in blueprint.recipes]


def model_info(checkpoint: Checkpoint, spec: Any, text: TokenizerInfo, stored: str) -> ModelInfo[Any]:
    """What a checkpoint says beside its weights, which are mostly of the type `stored`."""
    return ModelInfo(
        spec=spec,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        add_bos=text.add_bos,
        special_token_ids=text.special_token_ids,
        checkpoint_format=f"{stored} {checkpoint.format_name}",
        generation_defaults=checkpoint.generation_defaults(),
    )


def _stored(checkpoint: Checkpoint, part: Part) -> StoredTensor:
    tensor = checkpoint.tensors.get(part.tensor)
    if tensor is None:
        raise FormatError(f"tensor {part.tensor} {list(part.stored_shape)} is missing", path=checkpoint.path)
    if tensor.shape != part.stored_shape:
        raise FormatError(
            f"tensor {part.tensor}: expected shape {list(part.stored_shape)}, found {list(tensor.shape)}",
            path=checkpoint.path,
        )
    known = [*FLOAT_TYPES, *(QUANTIZED_TYPES if len(part.shape) == 2 else ())]
    if tensor.type_name not in known:
        what = "matrices" if len(part.shape) == 2 else "vectors"
        raise UnsupportedModelError(
            f"tensor {part.tensor}: type {tensor.type_name} is not supported for {what} (only {', '.join(known)} are)."
        )
    return tensor


def _need_quantization(checkpoint: Checkpoint, matrices: list[StoredTensor], quantization: str | None) -> None:
    """Refuse a quantization that would have no effect, or that would be a lie."""
    quantized = sorted({tensor.type_name for tensor in matrices} & QUANTIZED_TYPES.keys())
    if quantization == "none" and quantized:
        raise ConfigError(
            f"quantization none needs float weights, {checkpoint.path} stores {', '.join(quantized)}: leave it out."
        )
    if quantization is not None and all(tensor.type_name in QUANTIZED_TYPES for tensor in matrices):
        raise ConfigError(
            f"quantization {quantization} needs float weights, {checkpoint.path} already stores "
            f"{', '.join(quantized)}: leave it out."
        )


def _main_type(matrices: list[StoredTensor]) -> str:
    """The type that most bytes are stored in."""
    nbytes: Counter[str] = Counter()
    for tensor in matrices:
        nbytes[tensor.type_name] += tensor.nbytes
    return nbytes.most_common(1)[0][0]


def _writer(
    checkpoint: Checkpoint, recipe: Recipe, tensors: list[StoredTensor], quantization: str | None
) -> TensorWriter:
    if len(recipe.shape) == 1:
        return TensorWriter(recipe.name, None, 4 * recipe.shape[0], partial(_vector, checkpoint, recipe))
    fmt = _format(recipe, [tensor.type_name for tensor in tensors], quantization)
    return TensorWriter(recipe.name, fmt, fmt.nbytes, partial(_matrix, checkpoint, recipe, tensors, fmt))


def _format(recipe: Recipe, types: list[str], quantization: str | None) -> MatrixFormat:
    """The narrowest format that holds every part. Float parts merged with quantized ones become 8-bit quants."""
    n, k = recipe.shape
    all_float = all(name in FLOAT_TYPES for name in types)
    if all_float and (quantization in (None, "none") or recipe.name.endswith(_ROUTER)):
        return MatrixFormat(n, k, 16, Correction.NONE)
    stored = [QUANTIZED_TYPES[name] for name in types if name in QUANTIZED_TYPES]
    corrections = [kind.correction for kind in stored]
    bits = max((kind.bits for kind in stored), default=4)
    if len(stored) < len(types):
        bits = max(bits, 4 if quantization == "int4" and recipe.name not in _VOCABULARY else 8)
        corrections.append(FLOAT_CORRECTION)
    return MatrixFormat(n, k, bits, max(corrections))


def _vector(checkpoint: Checkpoint, recipe: Recipe) -> Iterator[NDArray[np.generic]]:
    part_of, row_of = recipe.rows()
    values = np.empty(recipe.shape, np.float32)
    for i, part in enumerate(recipe.parts):
        values[part_of == i] = read_vector(checkpoint, part.tensor)[row_of[part_of == i]] + np.float32(part.plus)
    yield values


def _matrix(
    checkpoint: Checkpoint, recipe: Recipe, tensors: list[StoredTensor], fmt: MatrixFormat
) -> Iterator[NDArray[np.generic]]:
    """The packed bytes of a matrix. Strips follow one another, so packing a chunk of strips is packing the whole."""
    part_of, row_of = recipe.rows()
    step = max(1, CHUNK_VALUES // (fmt.k * STRIP)) * STRIP
    for start in range(0, fmt.n, step):
        chunk = _Chunk(fmt, min(step, fmt.n - start))
        parts, rows = part_of[start : start + step], row_of[start : start + step]
        for i, tensor in enumerate(tensors):
            chosen = np.flatnonzero(parts == i)
            if not len(chosen):
                continue
            # A permutation moves rows within a head only: the span read is the chunk's rows, rounded to heads.
            first, last = int(rows[chosen].min()), int(rows[chosen].max())
            chunk.put(checkpoint, tensor, chosen, first, last + 1, rows[chosen] - first)
        yield chunk.packed()


class _Chunk:
    """Some rows of a matrix, in the arithmetic of its format."""

    def __init__(self, fmt: MatrixFormat, num_rows: int) -> None:
        self._fmt = fmt
        self._values = np.empty((num_rows, fmt.k), np.uint8 if fmt.is_quantized else np.uint16)
        self._scales = np.empty((num_rows, fmt.k // GROUP if fmt.is_quantized else 0), np.float16)
        self._mins = np.empty_like(self._scales) if fmt.correction is Correction.MIN else None

    def put(
        self, checkpoint: Checkpoint, tensor: StoredTensor, at: NDArray[np.int64], first: int, last: int,
        local: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Rows `local` of a tensor's rows [first, last) become rows `at` of the chunk."""
        raw = checkpoint.read_rows(tensor.name, first, last)
        decode_float = FLOAT_TYPES.get(tensor.type_name)
        if decode_float is None:
            quantized = QUANTIZED_TYPES[tensor.type_name].decode(raw)
            for array in (quantized.scales, quantized.mins):
                if array is not None and not np.isfinite(array).all():
                    raise FormatError(
                        f"tensor {tensor.name} holds a scale that is not finite in float16", path=checkpoint.path
                    )
        else:
            values = decode_float(raw)
            _need_range(checkpoint, tensor, values, MAX_QUANTIZED if self._fmt.is_quantized else MAX_BF16)
            if not self._fmt.is_quantized:
                self._values[at] = to_bf16(values)[local]
                return
            quantized = quantize(values, self._fmt.bits)
        promoted = promote(quantized, self._fmt, tensor.name)
        self._values[at], self._scales[at] = promoted.quants[local], promoted.scales[local]
        if self._mins is not None:
            assert promoted.mins is not None
            self._mins[at] = promoted.mins[local]

    def packed(self) -> NDArray[np.uint8]:
        if not self._fmt.is_quantized:
            return pack_bf16(self._values.astype(np.uint16, copy=False))[1]
        return pack_matrix(self._values.astype(np.uint8, copy=False), self._scales, self._mins, bits=self._fmt.bits)[1]


def _need_range(checkpoint: Checkpoint, tensor: StoredTensor, values: NDArray[np.float32], limit: float) -> None:
    """Refuse what would become infinite, or the limit, in its layout. A NaN is the minimum wherever it stands."""
    low, high = float(values.min()), float(values.max())
    if not (-limit <= low and high <= limit):
        found = high if -limit <= low else low
        raise FormatError(
            f"tensor {tensor.name}: expected finite values of at most {limit:.5g}, found {found:.5g}",
            path=checkpoint.path,
        )


def promote(matrix: Quantized, fmt: MatrixFormat, name: str) -> Quantized:
    """The same weights in the wider arithmetic of `fmt` (only its bits and correction count).

    4 bits in 8 keep their value. A zero point becomes the min -zero_point * scale, a multiplication by a power of two:
    exact unless it overflows float16, which raises UnsupportedModelError naming the tensor.
    """
    zero_point = 1 << (matrix.bits - 1)
    if fmt.correction is Correction.MIN:
        mins = matrix.mins
        if mins is None:
            exact = matrix.scales.astype(np.float32) * -zero_point
            with np.errstate(over="ignore"):
                mins = exact.astype(np.float16)
            wrong = np.argwhere(mins.astype(np.float32) != exact)
            if len(wrong):
                row, group = wrong[0]
                raise UnsupportedModelError(
                    f"tensor {name} is merged with one that has mins, but its scale {matrix.scales[row, group]} in row "
                    f"{row}, group {group} has no exact float16 min."
                )
        return Quantized(fmt.bits, matrix.quants, matrix.scales, mins)
    assert matrix.mins is None, "a min never becomes a zero point"
    return Quantized(fmt.bits, matrix.quants + np.uint8(fmt.zero_point - zero_point), matrix.scales, None)
