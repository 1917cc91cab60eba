"""Every request field that the OpenAI API and vLLM's extensions of it know, and what this server does with each.

A field works, is a hint (valid, recorded in a metric, without effect on the answer), or is refused with 400 because
ignoring it would change the answer. Null and the listed no-op values of a refused field pass.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError


class Use(enum.Enum):
    WORKS = "works"
    HINT = "hint"
    REFUSED = "refused"


NOT_SUPPORTED = "is not supported by this server"


@dataclass(frozen=True, slots=True)
class Field:
    """One field's class. `no_ops` are values that ask for nothing; null always is one."""

    use: Use
    no_ops: tuple[Any, ...] = ()
    reason: str = NOT_SUPPORTED

    def is_no_op(self, value: Any) -> bool:
        # 0 == False in Python, and they are different requests in JSON.
        return value is None or any(_is_bool(value) == _is_bool(no_op) and value == no_op for no_op in self.no_ops)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


Table = Mapping[str, Field]

WORKS = Field(Use.WORKS)
HINT = Field(Use.HINT)


def refused(*no_ops: Any, reason: str = NOT_SUPPORTED) -> Field:
    return Field(Use.REFUSED, no_ops, reason)


_TEMPLATE_REASON = "cannot be set by a request: chat templates come from the model or the operator"

_FUNCTIONS_REASON = "is not supported by this server: use tools and tool_choice, which took its place"

_SAMPLING: dict[str, Field] = {
    # The OpenAI API.
    "model": WORKS,
    "temperature": WORKS,
    "top_p": WORKS,
    "n": WORKS,
    "seed": WORKS,
    "stop": WORKS,
    "max_tokens": WORKS,
    "presence_penalty": WORKS,
    "frequency_penalty": WORKS,
    "logit_bias": WORKS,
    "stream": WORKS,
    "stream_options": WORKS,
    "user": HINT,
    # vLLM's extensions.
    "top_k": WORKS,
    "min_p": WORKS,
    "repetition_penalty": WORKS,
    "stop_token_ids": WORKS,
    "ignore_eos": WORKS,
    "min_tokens": WORKS,
    "priority": WORKS,
    "cache_salt": WORKS,
    "request_id": HINT,
    "add_special_tokens": WORKS,
    "include_stop_str_in_output": WORKS,
    "skip_special_tokens": WORKS,
    # Spaces that a tokenizer's decoder would put there; those that are read here put none, so both ask for the same.
    "spaces_between_special_tokens": refused(True, False, reason="must be true or false"),
    "use_beam_search": refused(False),
    "length_penalty": refused(1.0),
    "prompt_logprobs": WORKS,
    "truncate_prompt_tokens": WORKS,
    "allowed_token_ids": WORKS,
    "bad_words": WORKS,
    "logits_processors": refused([]),
    "logits_processor_pattern": refused(),
    "response_format": WORKS,
    "structured_outputs": WORKS,
    "guided_json": WORKS,
    "guided_regex": WORKS,
    "guided_choice": WORKS,
    "guided_grammar": WORKS,
    "guided_decoding_backend": HINT,
    "guided_whitespace_pattern": refused(),
    "return_tokens_as_token_ids": WORKS,
    "return_token_ids": WORKS,
    "kv_transfer_params": refused(),
    "vllm_xargs": refused({}),
}

CHAT_FIELDS: Table = {
    "messages": WORKS,
    **_SAMPLING,
    "max_completion_tokens": WORKS,
    "logprobs": WORKS,
    "top_logprobs": WORKS,
    "tools": WORKS,
    "tool_choice": WORKS,
    "functions": refused([], reason=_FUNCTIONS_REASON),
    "function_call": refused("none", "auto", reason=_FUNCTIONS_REASON),
    "parallel_tool_calls": WORKS,
    "modalities": refused(["text"]),
    "audio": refused(),
    "moderation": refused(),
    "reasoning_effort": refused("none"),
    "verbosity": refused("medium"),
    "web_search_options": refused(),
    "prediction": HINT,  # promises speed; the answer is the same without
    "metadata": HINT,
    "store": HINT,
    "service_tier": HINT,
    "safety_identifier": HINT,
    "prompt_cache_key": HINT,
    "prompt_cache_options": HINT,
    "prompt_cache_retention": HINT,
    "echo": refused(False),
    "add_generation_prompt": WORKS,
    "continue_final_message": WORKS,
    "documents": refused([]),
    "chat_template": refused(reason=_TEMPLATE_REASON),
    "chat_template_kwargs": WORKS,
    "mm_processor_kwargs": refused({}),
    "media_io_kwargs": refused({}),
    "include_reasoning": refused(True),
    "thinking_token_budget": refused(),
    "add_special_tokens": refused(False, reason="is not supported by this server: the chat template places them"),
}

COMPLETION_FIELDS: Table = {
    "prompt": WORKS,
    **_SAMPLING,
    "echo": WORKS,
    "best_of": refused(1),
    "logprobs": WORKS,
    "suffix": refused(""),
    "prompt_embeds": refused(),
}

_TEXTS: dict[str, Field] = {
    "model": WORKS,
    "user": HINT,
    "truncate_prompt_tokens": WORKS,
    "priority": WORKS,
    "request_id": HINT,
    "mm_processor_kwargs": refused({}),
}

EMBEDDING_FIELDS: Table = {
    "input": WORKS,
    **_TEXTS,
    "encoding_format": WORKS,
    "dimensions": WORKS,
    "add_special_tokens": refused(True),
    "normalize": refused(),
    "messages": refused(),
    "embed_dtype": refused("float32"),
    "endianness": refused("native", "little"),
}

SCORE_FIELDS: Table = {
    "text_1": WORKS,
    "text_2": WORKS,
    **_TEXTS,
    "activation": refused(),
    "use_activation": refused(True),
}

RERANK_FIELDS: Table = {
    "query": WORKS,
    "documents": WORKS,
    **_TEXTS,
    "top_n": WORKS,
    "return_documents": WORKS,
    "activation": refused(),
    "use_activation": refused(True),
}

TOKENIZE_FIELDS: Table = {
    "model": WORKS,
    "prompt": WORKS,
    "messages": WORKS,
    "add_special_tokens": WORKS,
    "add_generation_prompt": WORKS,
    "continue_final_message": WORKS,
    "return_token_strs": WORKS,
    "tools": WORKS,
    "chat_template": refused(reason=_TEMPLATE_REASON),
    "chat_template_kwargs": WORKS,
    "mm_processor_kwargs": refused({}),
    "media_io_kwargs": refused({}),
}

DETOKENIZE_FIELDS: Table = {
    "model": WORKS,
    "tokens": WORKS,
}

STREAM_OPTION_FIELDS: Table = {
    "include_usage": WORKS,
    "continuous_usage_stats": WORKS,
    "include_obfuscation": HINT,  # pads chunks against observers of the wire; no part of the answer
}

RESPONSE_FORMAT_FIELDS: Table = {
    "type": WORKS,
    "json_schema": WORKS,
}

JSON_SCHEMA_FIELDS: Table = {
    "name": HINT,  # for the model to read, where a template showed it
    "description": HINT,
    "schema": WORKS,
    "strict": WORKS,
}

STRUCTURED_OUTPUT_FIELDS: Table = {
    "json": WORKS,
    "json_object": WORKS,
    "regex": WORKS,
    "choice": WORKS,
    "grammar": WORKS,
    "disable_any_whitespace": WORKS,
    "disable_fallback": HINT,  # there is nothing to fall back to
    "disable_additional_properties": refused(False),
    "whitespace_pattern": refused(),
    "structural_tag": refused(),
}

TOOL_FIELDS: Table = {
    "type": WORKS,
    "function": WORKS,
}

FUNCTION_FIELDS: Table = {
    "name": WORKS,
    "description": WORKS,
    "parameters": WORKS,
    "strict": WORKS,
}

MESSAGE_FIELDS: Table = {
    "role": WORKS,
    "content": WORKS,
    "name": WORKS,
    "refusal": WORKS,
    "reasoning": WORKS,
    "reasoning_content": WORKS,
    "annotations": HINT,
    "tool_calls": WORKS,
    "tool_call_id": WORKS,
    "function_call": refused(),
    "audio": refused(),
}


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a body holds beside fields that work: names without effect, and names that no table knows."""

    hints: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __add__(self, other: Inspection) -> Inspection:
        return Inspection(self.hints + other.hints, self.unknown + other.unknown)


def inspect(table: Table, body: Mapping[str, Any], prefix: str = "") -> Inspection:
    """Class every name of a body. Raises RequestError on a refused field that asks for something."""
    hints: list[str] = []
    unknown: list[str] = []
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            unknown.append(prefix + name)
        elif field.use is Use.HINT:
            if value is not None:
                hints.append(prefix + name)
        elif field.use is Use.REFUSED and not field.is_no_op(value):
            raise RequestError(
                f"{prefix}{name} {field.reason}.{_allowed(field)}", param=prefix + name, code="unsupported_parameter"
            )
    return Inspection(tuple(hints), tuple(unknown))


def _allowed(field: Field) -> str:
    if not field.no_ops:
        return " Leave it out."
    return " Leave it out, or send " + " or ".join(repr(value) for value in field.no_ops) + "."
