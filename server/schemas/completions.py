"""POST /v1/completions: the request, the answer, and the chunks of a streamed one."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from engine.errors import RequestError
from engine.request import MAX_LOGPROBS
from server.schemas.common import (
    MAX_CHOICES,
    NO_DETAILS,
    ChunkEncoder,
    GenerationBody,
    TokenDetails,
    Usage,
    is_none,
)
from server.schemas.fields import COMPLETION_FIELDS, Inspection, Table
from server.schemas.logprobs import CompletionLogprobs, PromptLogprobs

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
    max_tokens: int | None = Field(
        None, ge=0, description="Most tokens of an answer, cut to what the context leaves; 0 beside echo alone."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities of the tokens, with echo also the prompt's, and of so many of the most likely.",
    )
    add_special_tokens: bool | None = Field(None, description="Whether text gets the tokenizer's BOS; by default yes.")

    def inspect(self) -> Inspection:
        found = super().inspect()
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens may be 0 only where echo is true.", param="max_tokens")
        if not self.prompt:
            raise RequestError("prompt must not be empty.", param="prompt")
        if (total := len(self.prompts()) * self.num_choices) > MAX_CHOICES:
            raise RequestError(f"prompts times n must be at most {MAX_CHOICES}, got {total}.", param="prompt")
        return found

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)

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
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none, description="With return_token_ids.")
    token_ids: list[int] | None = Field(None, exclude_if=is_none, description="With return_token_ids.")


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

    def start(self, index: int, usage: Usage | None = None, prompt_token_ids: list[int] | None = None) -> bytes:
        if prompt_token_ids is None:
            return b""
        choice = b'{"index":%d,"text":"","logprobs":null,"prompt_token_ids":%b,"finish_reason":null}'
        return self._head + choice % (index, self._encode(prompt_token_ids)) + self._end(usage)

    def text(self, index: int, text: str, usage: Usage | None = None, details: TokenDetails = NO_DETAILS) -> bytes:
        choice = b'{"index":%d,"text":%b,%b"finish_reason":null}'
        return self._head + choice % (index, self._encode(text), self._details(details)) + self._end(usage)

    def finish(self, index: int, reason: str, usage: Usage | None = None) -> bytes:
        choice = b'{"index":%d,"text":"","logprobs":null,"finish_reason":%b}'
        return self._head + choice % (index, self._encode(reason)) + self._end(usage)
