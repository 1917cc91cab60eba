"""What requests take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

from seraph_client.retries import Timeouts

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hi"}, and whatever else the API knows of messages."""

Messages = str | Sequence[Message]
"""A conversation; a string stands for one user message."""

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""Text or token ids, or several of either."""

Texts = str | Sequence[str]
"""A text, or several."""


class Function(TypedDict, total=False):
    """A function that the model may call. `parameters` is a JSON schema of type object; without it there are none."""

    name: Required[str]
    description: str
    parameters: Mapping[str, Any]
    strict: bool  # arguments keep to the schema in any case


class Tool(TypedDict):
    """A tool; all of them are functions."""

    type: Literal["function"]
    function: Function


class FunctionName(TypedDict):
    name: str


class NamedTool(TypedDict):
    """A tool by its name; as a choice, the one that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(TypedDict):
    mode: Literal["auto", "required"]
    tools: Sequence[NamedTool]


class AllowedToolsChoice(TypedDict):
    """Those of the tools that count."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice


class JsonSchema(TypedDict, total=False):
    name: Required[str]
    schema: Required[Mapping[str, Any]]
    description: str
    strict: bool  # answers keep to the schema in any case


class ResponseFormat(TypedDict, total=False):
    """The form of an answer, the OpenAI API's way; `json_schema` goes with the type of that name."""

    type: Required[Literal["text", "json_object", "json_schema"]]
    json_schema: JsonSchema


class StructuredOutputs(TypedDict, total=False):
    """The form of an answer, vLLM's way: one of json, json_object, regex, choice and grammar."""

    json: str | Mapping[str, Any]  # a JSON schema
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str  # Lark or GBNF
    disable_any_whitespace: bool


class CallOptions(TypedDict, total=False):
    """What every call takes beside its own fields."""

    timeout: Timeouts | float
    """In place of the client's; a number is the whole call's. Not sent."""


class ModelOptions(CallOptions, total=False):
    """What every call to a model takes; the server's defaults hold for fields left out."""

    model: str
    extra: Mapping[str, Any]
    """Further fields, sent as they are."""


class Options(ModelOptions, total=False):
    """What chats and completions both take beside what the model is to read."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    ignore_eos: bool
    skip_special_tokens: bool
    response_format: ResponseFormat
    structured_outputs: StructuredOutputs
    prompt_logprobs: int  # of so many tokens in place of each of the prompt's; whole answers only
    return_token_ids: bool
    return_tokens_as_token_ids: bool  # log-probabilities name tokens as token_id:7
    truncate_prompt_tokens: int  # keep only so many of the prompt's, the last ones; -1: as many as fit
    priority: int  # lower runs first
    cache_salt: str
    user: str


class TemplateOptions(TypedDict, total=False):
    """How the chat template renders a conversation."""

    tools: Sequence[Tool]
    chat_template_kwargs: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool


class ChatOptions(Options, TemplateOptions, total=False):
    """Fields of a chat request beside the messages."""

    tool_choice: ToolChoice
    parallel_tool_calls: bool  # whether an answer may call several times
    logprobs: bool
    top_logprobs: int  # needs logprobs


class CompletionOptions(Options, total=False):
    """Fields of a completion request beside the prompts."""

    echo: bool  # the prompt before the answer
    logprobs: int  # of so many tokens in place of each; with echo the prompt's too
    add_special_tokens: bool  # whether text gets the tokenizer's BOS


class TokenizeOptions(ModelOptions, TemplateOptions, total=False):
    """Fields of a request for token ids beside the text or the conversation."""

    add_special_tokens: bool  # whether a text gets the tokenizer's BOS


class TextOptions(ModelOptions, total=False):
    """Fields of a request about texts beside the texts."""

    truncate_prompt_tokens: int  # cut longer texts to so many; -1: to as many as the model reads
    priority: int  # lower runs first
    user: str


class EmbedOptions(TextOptions, total=False):
    """Fields of an embeddings request beside the texts."""

    dimensions: int
    encoding_format: Literal["float", "base64"]
    """How vectors travel, base64 where this is left out: a quarter of the bytes, the same numbers."""
