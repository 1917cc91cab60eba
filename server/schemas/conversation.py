"""What conversations bring beside text: calls of tools in their history, and how the chat template renders them."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from pydantic import Field

from engine.errors import RequestError
from engine.text.chat_template import need_free
from server.schemas.body import Body
from server.schemas.common import RequestBody
from server.schemas.fields import Inspection
from server.schemas.tools import Tools, inspect_tools

MAX_TOOL_CALLS = 128
MAX_TEMPLATE_VARIABLES = 64
MAX_TEMPLATE_BYTES = 64 << 10
"""Of the template's variables, as JSON."""

MAX_NESTED = 64
"""Depth of a call's arguments and of variables; what reads them further on is recursive."""

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)


class CalledFunction(Body):
    """A function that the model called, its arguments as the text of a JSON object."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str = ""


class ToolCall(Body):
    """A call that stands in a conversation's history."""

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self, where: str) -> dict[str, Any]:
        """As chat templates read it: they write the arguments as JSON themselves, so here they are data."""
        arguments: Any = {}
        if self.function.arguments.strip():
            try:
                arguments = msgspec.json.decode(self.function.arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict) or _is_deep(arguments):
            param = f"{where}.function.arguments"
            raise RequestError(
                f"{param} must be the text of a JSON object, nested at most {MAX_NESTED} deep.",
                param=param,
                code="invalid_value",
            )
        call = {"type": self.type, "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


class TemplateBody(RequestBody):
    """How a conversation is rendered. Null means the default throughout."""

    tools: Tools | None = Field(None, description="Functions that the model may call.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=MAX_TEMPLATE_VARIABLES, description="Variables of the chat template by name, up to 64 KiB."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Begin the assistant's message; by default yes, unless the final one is continued."
    )
    continue_final_message: bool | None = Field(
        None, description="Leave the last message open, so that the answer continues it."
    )

    def inspect(self) -> Inspection:
        found = super().inspect()
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other: a message is either begun or "
                "continued.",
                param="continue_final_message",
            )
        if self.chat_template_kwargs:
            _check_variables(self.chat_template_kwargs)
        return found + inspect_tools(self.tools or ())

    def template_arguments(self) -> dict[str, Any]:
        """What a text side's `encode_chat` takes beside the messages."""
        continued = bool(self.continue_final_message)
        begun = not continued if self.add_generation_prompt is None else self.add_generation_prompt
        arguments: dict[str, Any] = {"add_generation_prompt": begun, "continue_final_message": continued}
        if self.tools:
            arguments["tools"] = [tool.for_template() for tool in self.tools]
        return {**(self.chat_template_kwargs or {}), **arguments}


def _check_variables(variables: dict[str, Any]) -> None:
    """Raise RequestError for names that are none, or not the caller's to set, and for more than may be."""
    for name in variables:
        if _VARIABLE.fullmatch(name) is None:
            raise RequestError(
                f"chat_template_kwargs: {name[:64]!r} is no name of a variable.", param="chat_template_kwargs"
            )
    try:
        need_free(variables)
    except RequestError as error:
        raise RequestError(f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None
    if _is_deep(variables):
        raise RequestError(
            f"chat_template_kwargs must be nested at most {MAX_NESTED} deep.", param="chat_template_kwargs"
        )
    if (size := len(msgspec.json.encode(variables))) > MAX_TEMPLATE_BYTES:
        raise RequestError(
            f"chat_template_kwargs must be at most {MAX_TEMPLATE_BYTES} bytes of JSON, got {size}.",
            param="chat_template_kwargs",
        )


def _is_deep(value: object) -> bool:
    """Whether lists and objects are nested deeper than they may be, told without recursion."""
    level = [value]
    for _ in range(MAX_NESTED + 1):
        inside: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inside += one.values()
            elif isinstance(one, list):
                inside += one
        level = inside
    return bool(level)
