"""POST /tokenize and /detokenize, as vLLM has them: texts and conversations to token ids and back."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, Field

from engine.errors import RequestError
from server.schemas.chat import MAX_MESSAGES, Message, inspect_messages, templated
from server.schemas.common import RequestBody
from server.schemas.conversation import TemplateBody
from server.schemas.fields import DETOKENIZE_FIELDS, TOKENIZE_FIELDS, Inspection, Table


class TokenizeRequest(TemplateBody):
    """A text, or a conversation as the chat template would render it."""

    fields: ClassVar[Table] = TOKENIZE_FIELDS

    model: str | None = Field(None, min_length=1, description="A model id; may be left out where there is one.")
    prompt: str | None = Field(None, description="A text. Either this or messages.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(None, description="Whether a text gets the model's BOS; by default yes.")
    return_token_strs: bool | None = Field(None, description="Tell each token as the vocabulary writes it, too.")

    def inspect(self) -> Inspection:
        found = super().inspect()
        if (self.prompt is None) == (self.messages is None):
            given = "neither" if self.prompt is None else "both"
            raise RequestError(f"Give either prompt or messages, got {given}.", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise RequestError(
                "add_special_tokens does not go with messages: the chat template places them.",
                param="add_special_tokens",
            )
        for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools"):
            if self.messages is None and getattr(self, name):
                raise RequestError(f"{name} says how messages are rendered, and there are none.", param=name)
        return found + inspect_messages(self.messages or ())

    def for_template(self) -> list[dict[str, Any]]:
        """The messages as chat templates read them. Raises RequestError naming the part that is not text."""
        return templated(self.messages or ())


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """Token ids."""

    fields: ClassVar[Table] = DETOKENIZE_FIELDS

    model: str | None = Field(None, min_length=1, description="A model id; may be left out where there is one.")
    tokens: list[int]


class Detokenized(BaseModel):
    prompt: str
