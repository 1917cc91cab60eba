"""From a checked GGUF file to what is packed: a family's recipes, carried out a few MB at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.errors import FormatError, UnsupportedModelError
from engine.kernels.layout import STRIP, Correction, MatrixFormat, pack_matrix
from engine.models.recipe import Part, Recipe
from engine.models.registry import family_of
from engine.models.spec import ModelInfo
from engine.weights.gguf import GgufFile, GgufTensor
from engine.weights.gguf_tokenizer import read_tokenizer
from engine.weights.gguf_types import MATRIX_TYPES, VECTOR_TYPES, MatrixType, Quantized, VectorDecoder
from engine.weights.pack import TensorWriter

CHUNK_VALUES = 4 << 20
"""Weights converted at a time; a chunk is whole strips, and at least one."""


def convert(file: GgufFile) -> tuple[ModelInfo, list[TensorWriter]]:
    """What `file` holds, and its tensors ready to be packed (their bytes are read when a chunk is asked for).

    Raises UnsupportedModelError for what we do not implement, FormatError for a file that contradicts itself.
    """
    pieces = file.metadata.get("split.count")
    if isinstance(pieces, int) and pieces > 1:
        raise UnsupportedModelError(f"checkpoints split over several files are not supported (split.count {pieces}).")
    family = family_of(file.metadata)
    spec = family.read_spec(file.metadata, {tensor.name: tensor.shape for tensor in file.tensors.values()})
    text = read_tokenizer(file.metadata, file.path)
    if text.vocab_size != spec.vocab_size:
        raise FormatError(
            f"tokenizer.ggml.tokens has {text.vocab_size} entries, the embedding {spec.vocab_size} rows", path=file.path
        )
    info = ModelInfo(
        spec=spec,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
        bos_token_id=text.bos_token_id,
        eos_token_ids=text.eos_token_ids,
        add_bos=text.add_bos,
        special_token_ids=text.special_token_ids,
    )
    recipes = family.recipes(spec)
    assert {recipe.name: recipe.shape for recipe in recipes} == spec.tensor_shapes()
    # A tensor that no recipe uses would be left out of the arithmetic, and the answer would be another model's.
    unused = file.tensors.keys() - {part.tensor for recipe in recipes for part in recipe.parts}
    if unused:
        raise UnsupportedModelError(f"{spec.family}: tensors that are not supported: {', '.join(sorted(unused)[:5])}.")
    return info, [_writer(file, recipe) for recipe in recipes]


def _writer(file: GgufFile, recipe: Recipe) -> TensorWriter:
    parts = [_part(file, part) for part in recipe.parts]
    if len(recipe.shape) == 1:
        _vector_decoder(parts[0])
        return TensorWriter(recipe.name, None, 4 * recipe.shape[0], partial(_vector, file, parts[0]))
    types = [_matrix_type(tensor) for tensor in parts]
    n, k = recipe.shape
    fmt = MatrixFormat(n, k, max(kind.bits for kind in types), max(kind.correction for kind in types))
    return TensorWriter(recipe.name, fmt, fmt.nbytes, partial(_matrix, file, recipe, parts, fmt))


def _part(file: GgufFile, part: Part) -> GgufTensor:
    tensor = file.tensors.get(part.tensor)
    if tensor is None:
        raise FormatError(f"tensor {part.tensor} {list(part.shape)} is missing", path=file.path)
    if tensor.shape != part.shape:
        raise FormatError(
            f"tensor {part.tensor}: expected shape {list(part.shape)}, found {list(tensor.shape)}", path=file.path
        )
    return tensor


def _matrix_type(tensor: GgufTensor) -> MatrixType:
    kind = MATRIX_TYPES.get(tensor.type)
    if kind is None:
        raise _unsupported(tensor, "matrices", [kind.name for kind in MATRIX_TYPES])
    return kind


def _vector_decoder(tensor: GgufTensor) -> VectorDecoder:
    kind = VECTOR_TYPES.get(tensor.type)
    if kind is None:
        raise _unsupported(tensor, "vectors", [kind.name for kind in VECTOR_TYPES])
    return kind


def _unsupported(tensor: GgufTensor, what: str, known: list[str]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"tensor {tensor.name}: type {tensor.type.name} is not supported for {what} (only {', '.join(known)} are)."
    )


def _vector(file: GgufFile, tensor: GgufTensor) -> Iterator[NDArray[np.generic]]:
    vector = _vector_decoder(tensor)(file.read_rows(tensor, 0, 1)[0])
    _need_finite(file, tensor, vector)
    yield vector


def _matrix(
    file: GgufFile, recipe: Recipe, tensors: list[GgufTensor], fmt: MatrixFormat
) -> Iterator[NDArray[np.generic]]:
    """The packed bytes of a matrix. Strips follow one another, so packing a chunk of strips is packing the whole."""
    part_of, row_of = recipe.rows()
    step = max(1, CHUNK_VALUES // (fmt.k * STRIP)) * STRIP
    for start in range(0, fmt.n, step):
        parts, rows = part_of[start : start + step], row_of[start : start + step]
        quants = np.empty((len(rows), fmt.k), np.uint8)
        scales = np.empty((len(rows), fmt.num_groups), np.float16)
        mins = np.empty_like(scales) if fmt.correction is Correction.MIN else None
        for i, tensor in enumerate(tensors):
            chosen = np.flatnonzero(parts == i)
            if not len(chosen):
                continue
            # A permutation moves rows within a head only: the span read is the chunk's rows, rounded to heads.
            first, last = int(rows[chosen].min()), int(rows[chosen].max())
            decoded = _matrix_type(tensor).decode(file.read_rows(tensor, first, last + 1))
            _need_finite(file, tensor, decoded.scales, decoded.mins)
            promoted = promote(decoded, fmt, tensor.name)
            local = rows[chosen] - first
            quants[chosen], scales[chosen] = promoted.quants[local], promoted.scales[local]
            if mins is not None:
                assert promoted.mins is not None
                mins[chosen] = promoted.mins[local]
        yield pack_matrix(quants, scales, mins, bits=fmt.bits)[1]


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


def _need_finite(file: GgufFile, tensor: GgufTensor, *arrays: NDArray[np.floating] | None) -> None:
    """One NaN in the weights makes every answer NaN: refuse it where it can be named."""
    for array in arrays:
        if array is not None and not np.isfinite(array).all():
            raise FormatError(f"tensor {tensor.name} holds a value that is not finite", path=file.path)
