"""Tools in a request: those that there are, which of them may or must be called, and calls in answers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from engine.errors import RequestError
from engine.sampling.tool_grammar import Calls
from server.schemas.body import Body
from server.schemas.fields import FUNCTION_FIELDS, TOOL_FIELDS, Inspection, inspect

MAX_TOOLS = 128

_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function that has no parameters."""


class FunctionDefinition(Body):
    """A function. Arguments keep to its parameters, `strict` or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of type object; none: no parameters.")
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition

    def schema_of_arguments(self, where: str) -> dict[str, Any]:
        """Raises RequestError for a schema whose values are no objects."""
        schema = _NOTHING if self.function.parameters is None else self.function.parameters
        if schema.get("type", "object") != "object":
            param = f"{where}.function.parameters"
            raise RequestError(f"{param} of {self.function.name} must have type 'object'.", param=param)
        return {"type": "object", **schema}

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": self.type, "function": function}


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def inspect_tools(tools: Sequence[Tool]) -> Inspection:
    """Class the names within tools. Raises RequestError for two of one name."""
    found, names = Inspection(), set[str]()
    for i, tool in enumerate(tools):
        found += inspect(TOOL_FIELDS, tool.model_extra or {}, f"tools.{i}.")
        found += inspect(FUNCTION_FIELDS, tool.function.model_extra or {}, f"tools.{i}.function.")
        if tool.function.name in names:
            param = f"tools.{i}.function.name"
            raise RequestError(f"{param}: there are two tools named {tool.function.name!r}.", param=param)
        names.add(tool.function.name)
    return found


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    """A tool by its name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoiceObject(Body):
    """One tool that must be called, or those of the tools that count."""

    type: Literal["function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


def _choice(value: Any) -> Any:
    if value is not None and not isinstance(value, dict) and value not in ("none", "auto", "required"):
        raise ValueError("must be none, auto, required or an object that names a function")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | ToolChoiceObject | None, BeforeValidator(_choice)]


def chosen(choice: ToolChoice, tools: Sequence[Tool]) -> tuple[Calls, list[str]]:
    """Whether tools are called, and the names of those that may be. Raises RequestError for names that no tool has."""
    names = [tool.function.name for tool in tools]
    if not isinstance(choice, ToolChoiceObject):
        calls: Calls = choice or "auto"
        if not names and calls == "required":
            raise RequestError("tool_choice 'required' needs tools.", param="tool_choice")
        return (calls if names else "none"), names
    part = choice.function if choice.type == "function" else choice.allowed_tools
    if part is None:
        param = f"tool_choice.{choice.type}"
        raise RequestError(f"{param} is missing.", param=param, code="missing_required_parameter")
    wanted = [part.name] if isinstance(part, NamedFunction) else [tool.function.name for tool in part.tools]
    for name in wanted:
        if name not in names:
            raise RequestError(f"tool_choice names {name[:64]!r}, and no tool has that name.", param="tool_choice")
    mode: Calls = "required" if isinstance(part, NamedFunction) else part.mode
    return mode, [name for name in names if name in wanted]


class AnswerFunction(BaseModel):
    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call that an answer makes."""

    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


def call_id(length: int | None) -> str:
    """The id of a new call; `length` is what the model's chat template insists on."""
    return f"call_{uuid.uuid4().hex[:24]}" if length is None else uuid.uuid4().hex[:length]
