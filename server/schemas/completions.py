"""POST /v1/completions: the request, the answer, and the chunks of a streamed one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from engine.errors import RequestError
from server.schemas.common import MAX_CHOICES, ChunkEncoder, GenerationBody, Usage
from server.schemas.fields import COMPLETION_FIELDS, Inspection, Table

DEFAULT_MAX_TOKENS = 16
"""What the OpenAI API writes where a completion request names no max_tokens."""

Prompt = str | list[int]


def _prompt(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One message for the whole union, instead of one per shape that a prompt can have."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("must be a text, a list of texts, token ids, or a list of lists of token ids") from None


Prompts = Annotated[str | list[str] | list[int] | list[list[int]], WrapValidator(_prompt)]


class CompletionRequest(GenerationBody):
    """Texts to continue."""

    fields: ClassVar[Table] = COMPLETION_FIELDS

    prompt: Prompts = Field(description="A text, token ids, or a list of either; each is continued by itself.")
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    add_special_tokens: bool | None = Field(None, description="Whether text gets the tokenizer's BOS; by default yes.")

    def inspect(self) -> Inspection:
        found = super().inspect()
        if not self.prompt:
            raise RequestError("prompt must not be empty.", param="prompt")
        if (total := len(self.prompts()) * self.num_choices) > MAX_CHOICES:
            raise RequestError(f"prompts times n must be at most {MAX_CHOICES}, got {total}.", param="prompt")
        return found

    def prompts(self) -> list[Prompt]:
        """One entry per prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunks(ChunkEncoder):
    """The chunks of a streamed completion."""

    object = "text_completion"

    def start(self, index: int, usage: Usage | None = None) -> bytes:
        return b""

    def text(self, index: int, text: str, usage: Usage | None = None) -> bytes:
        choice = b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null}'
        return self._head + choice % (index, self._encode(text)) + self._end(usage)

    def finish(self, index: int, reason: str, usage: Usage | None = None) -> bytes:
        choice = b'{"index":%d,"text":"","logprobs":null,"finish_reason":%b}'
        return self._head + choice % (index, self._encode(reason)) + self._end(usage)
