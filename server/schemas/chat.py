"""POST /v1/chat/completions: the request, the answer, and the chunks of a streamed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from engine.errors import RequestError
from engine.request import IGNORE_EOS_REASON, MAX_LOGPROBS
from engine.text.answer_parser import Arguments, CallBegin, Event, Reasoning
from server.schemas.body import Body
from server.schemas.common import NO_DETAILS, ChunkEncoder, GenerationBody, TokenDetails, Usage, is_none
from server.schemas.conversation import MAX_TOOL_CALLS, TemplateBody, ToolCall
from server.schemas.fields import CHAT_FIELDS, MESSAGE_FIELDS, Inspection, Table, inspect
from server.schemas.logprobs import ChatLogprobs, PromptLogprobs
from server.schemas.tools import AnswerToolCall, ToolChoice, chosen

MAX_MESSAGES = 4096
MAX_PARTS = 1024


def _parts(value: Any) -> Any:
    """Text is a list of one part, so that a wrong part is reported at its own place."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise ValueError("must be text or a list of parts")
    return value


class ContentPart(Body):
    """One part of a message. Text (and refusals sent back to us) are read; other types are refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None

    def as_text(self, where: str) -> str:
        if self.type == "text" and self.text is not None:
            return self.text
        if self.type == "refusal" and self.refusal is not None:
            return self.refusal
        if self.type in ("text", "refusal"):
            raise RequestError(f"{where}.{self.type} is missing.", param=f"{where}.{self.type}")
        raise RequestError(
            f"{where} has type {self.type[:64]!r}: the model reads text only.",
            param=f"{where}.type",
            code="unsupported_content_type",
        )


PartList = Annotated[list[ContentPart], Field(max_length=MAX_PARTS)]
Content = Annotated[PartList | None, BeforeValidator(_parts)]


class Message(Body):
    """One message. Whatever an answer of ours holds may stand here again."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = Field(None, description="Text, or parts of type text.")
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOL_CALLS)
    tool_call_id: str | None = Field(None, max_length=256)

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as chat templates read it: role, content (None beside calls of tools) and what else is given."""
        if self.role == "function":
            raise RequestError(
                f"{where} has role 'function', which tools took the place of: give it the role 'tool'.",
                param=f"{where}.role",
                code="unsupported_parameter",
            )
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                param = f"{where}.{name}"
                raise RequestError(f"{param} belongs into a message of role {role!r}.", param=param)
        if self.content is None and self.role != "assistant":
            raise RequestError(f"{where}.content is missing.", param=f"{where}.content")
        texts = [part.as_text(f"{where}.content.{i}") for i, part in enumerate(self.content or ())]
        if self.content is None and self.refusal is not None:
            texts = [self.refusal]
        # Developer is the newer name of the role that models were trained to know as system.
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            calls = [call.for_template(f"{where}.tool_calls.{i}") for i, call in enumerate(self.tool_calls)]
            message |= {"content": message["content"] or None, "tool_calls": calls}
        reasoning = self.reasoning_content if self.reasoning_content is not None else self.reasoning
        if reasoning is not None and self.role == "assistant":
            message["reasoning_content"] = reasoning
        return message


def inspect_messages(messages: Sequence[Message]) -> Inspection:
    """Class every name of a conversation's messages; raises RequestError on refused ones."""
    found = Inspection()
    for i, message in enumerate(messages):
        found += inspect(MESSAGE_FIELDS, message.model_extra or {}, f"messages.{i}.")
    return found


def templated(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them. Raises RequestError naming the part that is not text."""
    return [message.for_template(f"messages.{i}") for i, message in enumerate(messages)]


class ChatCompletionRequest(GenerationBody, TemplateBody):
    """A conversation to answer."""

    fields: ClassVar[Table] = CHAT_FIELDS

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, description="As max_tokens, over which it wins.")

    logprobs: bool | None = Field(None, description="Give log-probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With each token those of so many of the most likely ones."
    )

    tool_choice: ToolChoice = Field(
        None,
        description="none, auto (the default), required, a function by its name, or allowed_tools.",
    )
    parallel_tool_calls: bool | None = Field(None, description="Whether an answer may call several times; by default.")

    def inspect(self) -> Inspection:
        calls, _ = chosen(self.tool_choice, self.tools or ())
        if calls != "none":
            self._inspect_calls()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: set it to true.", param="top_logprobs")
        return super().inspect() + inspect_messages(self.messages)

    def _inspect_calls(self) -> None:
        """Raise RequestError for what does not go together with calls."""
        if (form := self.asked_form()) is not None and not form[0].is_json:
            raise RequestError(
                f"{form[1]} must be JSON beside tools, or be left out: its text could hold what begins a call.",
                param=form[1],
            )
        for name in ("stop", "stop_token_ids"):
            if getattr(self, name):
                raise RequestError(
                    f"{name} would cut calls of tools in two: leave it out, or set tool_choice to 'none'.", param=name
                )
        if self.ignore_eos:
            raise RequestError(IGNORE_EOS_REASON, param="ignore_eos")

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def for_template(self) -> list[dict[str, Any]]:
        """The messages as chat templates read them. Raises RequestError naming the part that is not text."""
        return templated(self.messages)


FinishedBy = Literal["stop", "length", "tool_calls"]


class AnswerMessage(BaseModel):
    """`content` is null where there are calls alone. Reasoning stands under both names that clients know."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | None = Field(None, exclude_if=is_none)
    reasoning_content: str | None = Field(None, exclude_if=is_none)
    tool_calls: list[AnswerToolCall] | None = Field(None, exclude_if=is_none)


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishedBy
    token_ids: list[int] | None = Field(None, exclude_if=is_none, description="With return_token_ids.")


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"] = "default"
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(None, exclude_if=is_none, description="With return_token_ids.")


class ChatChunks(ChunkEncoder):
    """The chunks of a streamed chat."""

    object = "chat.completion.chunk"
    constants = {"service_tier": "default"}

    def start(self, index: int, usage: Usage | None = None, prompt_token_ids: list[int] | None = None) -> bytes:
        choice = b'{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,' % index
        prompt = b"" if prompt_token_ids is None else b',"prompt_token_ids":' + self._encode(prompt_token_ids)
        return self._head + choice + b'"finish_reason":null}]' + prompt + self._end(usage)[1:]

    def text(self, index: int, text: str, usage: Usage | None = None, details: TokenDetails = NO_DETAILS) -> bytes:
        choice = b'{"index":%d,"delta":{"content":%b},%b"finish_reason":null}'
        return self._head + choice % (index, self._encode(text), self._details(details)) + self._end(usage)

    def event(
        self, index: int, event: Event, call_id: str, usage: Usage | None = None, details: TokenDetails = NO_DETAILS
    ) -> bytes:
        """What a parsed answer gained; `call_id` is that of a call that begins."""
        delta: dict[str, Any]
        match event:
            case Reasoning(text):
                delta = {"reasoning": text, "reasoning_content": text}
            case CallBegin(call, name):
                function = {"name": name, "arguments": ""}
                delta = {"tool_calls": [{"index": call, "id": call_id, "type": "function", "function": function}]}
            case Arguments(call, text):
                delta = {"tool_calls": [{"index": call, "function": {"arguments": text}}]}
            case _:
                return self.text(index, event.text, usage, details)
        choice = b'{"index":%d,"delta":%b,%b"finish_reason":null}'
        return self._head + choice % (index, self._encode(delta), self._details(details)) + self._end(usage)

    def finish(self, index: int, reason: str, usage: Usage | None = None) -> bytes:
        choice = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}'
        return self._head + choice % (index, self._encode(reason)) + self._end(usage)
