"""How models write calls of tools, as data: what a grammar is made of, and what the answer is read by.

    Let me see. <tool_call>\\n{"name": "clock", "arguments": {"zone": "UTC"}}\\n</tool_call>
    text        begin      ^ before    name ^ between  arguments           ^ end

A further call follows `separator`; after the last one stands `close`. Where a format has `parameter`, its three texts
stand around the names and values of the arguments, one by one, strings as they are and all else as JSON; none of them
may be a special token:

    <parameter=zone>\\nUTC\\n</parameter>\\n

Which format a model was trained on is found from its chat template. One whose template shows no tools is told about
them in a system message of ours (GENERIC).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.text.chat_template import ChatTemplate

THINK = "<think>"
THINK_END = "</think>"
"""Around what a model says to itself before it answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """One way to write calls. `begin` may be a special token of the model; the other texts may hold some."""

    name: str
    begin: str  # never part of an answer's text
    opening: str = ""  # follows it
    before: str = '{"name": "'
    between: str = '", "arguments": '
    end: str = "}"
    separator: str | None = None  # None: one call is all
    close: str = ""
    parameter: tuple[str, str, str] | None = None  # before an argument's name, between it and its value, and after that
    only_first: bool = False  # calls take the place of text: `begin` counts at the answer's first character alone
    id_length: int | None = None  # of calls, where the template insists on it
    is_templated: bool = True  # the chat template shows tools, calls and results
    tools_in_system: bool = False  # it shows no more than tools, those that the system message brings along as JSON

    @property
    def markers(self) -> str:
        """All texts, to look for special tokens in."""
        parts = (self.begin, self.opening, self.before, self.between, self.end, self.separator or "", self.close)
        return " ".join(parts + (self.parameter or ()))


_TAGGED: dict[str, Any] = {
    "begin": "<tool_call>",
    "opening": "\n",
    "end": "}\n</tool_call>",
    "separator": "\n<tool_call>\n",
}
HERMES = ToolFormat(name="hermes", **_TAGGED)
GENERIC = ToolFormat(name="generic", **_TAGGED, is_templated=False)
QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    **{**_TAGGED, "end": "</function>\n</tool_call>"},
    before="<function=",
    between=">\n",
    parameter=("<parameter=", ">\n", "\n</parameter>\n"),
)
LLAMA3_JSON = ToolFormat(
    name="llama3_json", begin='{"name": "', before="", between='", "parameters": ', only_first=True
)
MISTRAL = ToolFormat(name="mistral", begin="[TOOL_CALLS]", opening="[", separator=", ", close="]", id_length=9)
MISTRAL_V11 = ToolFormat(
    name="mistral_v11",
    begin="[TOOL_CALLS]",
    before="",
    between="[ARGS]",  # some templates show [CALL_ID] and the id before it; an answer's ids are ours
    end="",
    separator="[TOOL_CALLS]",
    id_length=9,
)

PHI4_MINI = ToolFormat(
    name="phi4_mini",
    begin="<|tool_call|>",
    opening="[",
    separator=", ",
    close="]<|/tool_call|>",
    is_templated=False,
    tools_in_system=True,
)

FORMATS = {each.name: each for each in (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_V11, PHI4_MINI, QWEN3_CODER, GENERIC)}


def find_format(template: ChatTemplate) -> ToolFormat:
    """The format that a template renders calls in. GENERIC where it shows no tools, or in a way not known here."""
    source = template.source
    if not template.reads("tools"):
        return PHI4_MINI if "<|tool|>" in source and "message['tools']" in source else GENERIC
    if "<tool_call>" in source:
        if "<function=" in source and "<parameter=" in source:
            return QWEN3_CODER
        # Others put other things between the same markers.
        return GENERIC if "<function=" in source or "<arg_key>" in source else HERMES
    if "[TOOL_CALLS]" in source:
        return MISTRAL_V11 if "[ARGS]" in source else MISTRAL
    if '"parameters": ' in source and "ipython" in source:
        return LLAMA3_JSON
    return GENERIC


def has_reasoning(template: ChatTemplate) -> bool:
    """Whether a template knows of text between <think> and </think>."""
    return THINK_END in template.source


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument that is written on its own."""

    name: str
    is_required: bool
    schema: dict[str, Any] | None  # of its JSON; None: it is written as text
    choices: tuple[str, ...] = ()  # the only texts that it may be


_NOTES = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "$schema", "$defs", "definitions", *_NOTES}
_TIED = re.compile(r'"\$id"|"\$ref": "(?!#/(\$defs|definitions)/)')
"""In a schema as JSON: what means something else, or nothing, where a part of it stands alone."""


def parameters_of(form: ToolFormat, schema: Mapping[str, Any]) -> list[Parameter] | None:
    """The arguments that a schema names, in its order; None where they are written as one JSON object.

    So they are in most formats, and where a schema says of objects more than which properties they have. Properties
    that it only allows are never written.
    """
    if form.parameter is None or schema.get("type") != "object" or not schema.keys() <= _OF_OBJECTS:
        return None
    properties, required = schema.get("properties", {}), schema.get("required", [])
    others = schema.get("additionalProperties", True)
    if not isinstance(properties, dict) or not isinstance(required, list) or not isinstance(others, bool):
        return None
    if not properties and others:  # any object at all
        return None
    named = all(re.fullmatch(r"[\w$.-]+", name) and isinstance(each, dict) for name, each in properties.items())
    if not named or not all(isinstance(name, str) and name in properties for name in required):
        return None
    if _TIED.search(json.dumps(schema)):
        return None
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return [_parameter(form.parameter[2], name, each, name in required, shared) for name, each in properties.items()]


def _parameter(
    after: str, name: str, schema: Mapping[str, Any], is_required: bool, shared: Mapping[str, Any]
) -> Parameter:
    said = schema.keys() - _NOTES
    choices = schema.get("enum") or ()
    if said <= {"type", "enum"} and schema.get("type", "string" if choices else None) == "string":
        if "enum" not in said:
            return Parameter(name, is_required, None)
        # A text ends at the first place that looks like its end.
        if choices and all(isinstance(text, str) and (text + after).index(after) == len(text) for text in choices):
            return Parameter(name, is_required, None, tuple(choices))
    # What else is asked of a string is asked of its JSON.
    return Parameter(name, is_required, {**schema, **(shared if '"$ref"' in json.dumps(schema) else {})})


_INTRODUCTION = """\
You can call functions. Those that there are, each as a JSON object on a line of its own:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments, which follow its parameters, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{"a parameter": "its value"}}}}
</tool_call>
What it returned then comes as <tool_response>."""


def generic_history(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    shows_system: bool,
    form: ToolFormat = GENERIC,
) -> list[dict[str, Any]]:
    """A conversation in plain messages, for a template that knows no tools, or nothing but tools.

    The tools are described in the system message, or with the first message where the template shows none of that
    role. Calls become the assistant's text as it wrote them, results messages of the user, those that follow each
    other one message: many templates insist on turns.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"<tool_response>\n{_text(message.get('content'))}\n</tool_response>"
            if plain and plain[-1].pop("is_result", False):
                result = f"{plain.pop()['content']}\n{result}"
            plain.append({"role": "user", "content": result, "is_result": True})
            continue
        made = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if calls := message.get("tool_calls"):
            said = (_text(message.get("content")), _written(form, calls))
            made["content"] = "\n".join(text for text in said if text)
        plain.append(made)
    for message in plain:
        message.pop("is_result", None)
    if tools and form.tools_in_system:
        if not plain or plain[0].get("role") != "system":
            plain.insert(0, {"role": "system", "content": "You are a helpful assistant with some tools."})
        plain[0] = {**plain[0], "tools": json.dumps([tool["function"] for tool in tools], ensure_ascii=False)}
    elif tools:
        _introduce(plain, tools, shows_system=shows_system)
    return plain


def _introduce(plain: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, shows_system: bool) -> None:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    introduction = _INTRODUCTION.format(tools=listed)
    if plain and plain[0].get("role") == ("system" if shows_system else "user"):
        texts = (_text(plain[0].get("content")), introduction)
        first = texts if shows_system else texts[::-1]
        plain[0] = {**plain[0], "content": "\n\n".join(text for text in first if text)}
    else:
        plain.insert(0, {"role": "system" if shows_system else "user", "content": introduction})


def _written(form: ToolFormat, calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as the model writes them, in a format with a separator."""
    each = []
    for call in calls:
        name, arguments = call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False)
        each.append(form.before + name + form.between + arguments + form.end)
    return form.begin + form.opening + (form.separator or "").join(each) + form.close


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content)


def shorten_ids(messages: Sequence[Mapping[str, Any]], length: int) -> list[dict[str, Any]]:
    """Ids of calls cut to their last characters, in calls and results alike, for templates that insist on a length."""

    def short(id: str) -> str:
        kept = "".join(c for c in id if c.isascii() and c.isalnum())
        return kept[-length:].rjust(length, "0")

    made: list[dict[str, Any]] = []
    for message in messages:
        changed = dict(message)
        if (id := message.get("tool_call_id")) is not None:
            changed["tool_call_id"] = short(id)
        if calls := message.get("tool_calls"):
            changed["tool_calls"] = [{**call, "id": short(call.get("id") or str(i))} for i, call in enumerate(calls)]
        made.append(changed)
    return made
