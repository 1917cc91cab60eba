"""POST /v1/embeddings: the request and the answer."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from engine.errors import RequestError
from server.schemas.common import RequestBody
from server.schemas.fields import EMBEDDING_FIELDS, Inspection, Table

MAX_TEXTS = 2048
"""Most texts of one request, as in the OpenAI API."""

Text = str | list[int]


def _input(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One message for the whole union, instead of one per shape that an input can have."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("must be a text, a list of texts, token ids, or a list of lists of token ids") from None


Inputs = Annotated[str | list[str] | list[int] | list[list[int]], WrapValidator(_input)]


class TextsBody(RequestBody):
    """What requests about texts share."""

    model: str = Field(min_length=1, description="A model id, as /v1/models lists it.")
    priority: int | None = Field(None, ge=-(1 << 31), lt=1 << 31, description="Lower runs first.")
    truncate_prompt_tokens: int | None = Field(
        None, description="Cut longer texts to so many tokens; -1: to as many as the model reads."
    )


class EmbeddingRequest(TextsBody):
    """Texts to be made vectors."""

    fields: ClassVar[Table] = EMBEDDING_FIELDS

    input: Inputs = Field(description="A text, token ids, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: the bytes of float32, little-endian."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Only so many numbers of each vector, the first ones, brought to length 1 again."
    )

    def inspect(self) -> Inspection:
        found = super().inspect()
        texts = self.texts()
        need_texts("input", texts)
        if any(not isinstance(text, str) for text in texts) and self.truncate_prompt_tokens is not None:
            raise RequestError(
                "truncate_prompt_tokens goes with texts: token ids are taken as they are.",
                param="truncate_prompt_tokens",
            )
        return found

    def texts(self) -> list[Text]:
        """One entry per text: text or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]
        texts: list[Text] = [*self.input]
        return texts


def need_texts(param: str, texts: list[Text]) -> None:
    """Raise RequestError unless there are 1 to MAX_TEXTS texts, none of them empty."""
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise RequestError(f"{param} must hold 1 to {MAX_TEXTS} texts, got {len(texts)}.", param=param)
    for index, text in enumerate(texts):
        if not text:
            raise RequestError(f"{param} {index} is empty.", param=param)


def shortened(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first `dimensions` numbers of vectors [texts, n], of length 1 again where they were before.

    Raises RequestError for more than there are.
    """
    size = vectors.shape[1]
    if dimensions is None or dimensions == size:
        return vectors
    if dimensions > size:
        raise RequestError(
            f"dimensions must be at most {size}, those of the model, got {dimensions}.", param="dimensions"
        )
    cut = vectors[:, :dimensions]
    if not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
        return cut  # of a model whose vectors have lengths that say something
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    normalized: NDArray[np.float32] = (cut / np.maximum(lengths, np.float32(1e-12))).astype(np.float32)
    return normalized


def encode_embeddings(model: str, vectors: NDArray[np.float32], *, as_base64: bool, num_tokens: int) -> bytes:
    """The answer's JSON; float32 [texts, dimensions]."""
    values: Iterable[Any]
    if as_base64:
        values = (base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors)
    else:
        values = vectors.tolist()
    data = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(values)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})
