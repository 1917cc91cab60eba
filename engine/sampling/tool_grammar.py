"""The grammar of answers that may, or must, call tools: made of the same ToolFormat that the answers are read by.

Every call names one of the tools and gives arguments that satisfy its schema. Text before a call is free, but that it
cannot hold what begins one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from engine.sampling.limits import with_options
from engine.text.tool_formats import THINK, THINK_END, ToolFormat, parameters_of

MAX_CALLS = 128
"""Most calls of one answer."""

Calls = Literal["none", "auto", "required"]
Thinks = Literal["no", "may", "must"]

_ANY = "(?s:.*)"


def tool_grammar(
    form: ToolFormat,
    schemas: Mapping[str, dict[str, Any]],
    *,
    calls: Calls,
    several: bool = True,
    thinks: Thinks = "no",
    special: Mapping[str, int] | None = None,
    content: str | None = None,
) -> str:
    """A grammar as Request.grammar has it.

    `schemas` are those of the arguments by the tool's name, `several` allows more than one call. An answer `may` begin
    with reasoning, or `must` end what the prompt has begun. `special` has the ids of those of the format's texts that
    are special tokens, which no text can make. `content` is the grammar of JSON that an answer is where it does not
    call; such an answer either calls at once or not at all, so the format must be one of `only_first`.
    """
    tokens = dict(special or {})
    rules = _reasoning(thinks, tokens)
    begin = _written(form.begin, tokens)
    if calls == "required" or content is not None:
        lead = {"no": "", "may": "(think GAP?)? ", "must": "think GAP? "}[thinks]
        answer = f"{begin} calls"
        if calls != "required":
            assert form.only_first and calls == "auto", "JSON may hold what begins a call"
            answer = f"(@content | {answer})"
        rules = [f"start: {lead}{answer}", *rules, r"GAP: /[ \n]{1,4}/"]
    else:
        lead = {"no": "", "may": "think? ", "must": "think "}[thinks]
        rules = [f"start: {lead}body", *rules, *_free(form, calls, thinks, tokens)]
    parts: dict[str, Mapping[str, Any]] = {}
    if calls != "none":
        rules += _calls(form, schemas, several, tokens, parts)
    grammars: list[dict[str, Any]] = [{"lark_grammar": "\n".join(rules) + "\n"}]
    grammars += [{"name": name, "json_schema": with_options(schema)} for name, schema in parts.items()]
    if content is not None and calls == "auto":
        grammars.append({**json.loads(content)["grammars"][0], "name": "content"})
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def _reasoning(thinks: Thinks, tokens: Mapping[str, int]) -> list[str]:
    if thinks == "no":
        return []
    if THINK_END in tokens:
        begin = "" if thinks == "must" else _written(THINK, tokens)
        return [f"think: {begin} ANY {_written(THINK_END, tokens)}", f"ANY: /{_ANY}/"]
    begin = "" if thinks == "must" else rf"\s*{_regex(THINK)}"
    return [f"think[lazy]: /{begin}{_ANY}{_regex(THINK_END)}/"]


def _free(form: ToolFormat, calls: Calls, thinks: Thinks, tokens: Mapping[str, int]) -> list[str]:
    """Rules of an answer that is text, and may turn into calls."""
    not_reasoning = rf" & ~/\s*{_regex(THINK)}{_ANY}/" if thinks != "no" else ""
    marker = _regex(form.begin)
    without = rf"\s*{marker}{_ANY}" if form.only_first else f"{_ANY}{marker}{_ANY}"
    text = f"TEXT: /{_ANY}/ & ~/{without}/{not_reasoning}"
    if calls == "none":
        return ["body: TEXT", text]
    begin = _written(form.begin, tokens)
    if form.only_first:
        return [f"body: TEXT | {begin} calls", text]
    if form.begin in tokens:
        return [f"body: TEXT ({begin} calls)?", text]
    # A lazy lexeme ends as soon as the marker is complete, which is where TEXT cannot go on.
    return ["body: TEXT | begin calls", "begin[lazy]: BEGIN", f"BEGIN: /{_ANY}{marker}/{not_reasoning}", text]


def _calls(
    form: ToolFormat,
    schemas: Mapping[str, dict[str, Any]],
    several: bool,
    tokens: Mapping[str, int],
    parts: dict[str, Mapping[str, Any]],
) -> list[str]:
    """Rules of calls; the schemas that they refer to go into `parts`, by their names."""
    further = ""
    if several and form.separator is not None:
        further = f"({_written(form.separator, tokens)} call){{0,{MAX_CALLS - 1}}} "
    one_of = " | ".join(
        f"{_written(form.before + name + form.between, tokens)} {_arguments(form, f't{i}', schema, tokens, parts)}"
        for i, (name, schema) in enumerate(schemas.items())
    )
    rules = [
        f"calls: {_written(form.opening, tokens)} call {further}{_written(form.close, tokens)}",
        f"call: ({one_of}) {_written(form.end, tokens)}",
    ]
    if form.parameter is not None:
        rules.append(f"text[lazy]: /{_ANY}{_regex(form.parameter[2])}/")
    return rules


def _arguments(
    form: ToolFormat,
    part: str,
    schema: Mapping[str, Any],
    tokens: Mapping[str, int],
    parts: dict[str, Mapping[str, Any]],
) -> str:
    """What the arguments of a call are in Lark."""
    each = parameters_of(form, schema)
    if each is None:
        parts[part] = schema
        return f"@{part}"
    assert form.parameter is not None
    before, between, after = form.parameter
    written = []
    for i, parameter in enumerate(each):
        if parameter.schema is not None:
            parts[f"{part}_{i}"] = parameter.schema
            value = f"@{part}_{i} {_written(after, tokens)}"
        elif parameter.choices:
            value = f"({' | '.join(_written(text + after, {}) for text in parameter.choices)})"
        else:
            value = "text"  # ends with what follows it
        optional = "" if parameter.is_required else "?"
        written.append(f"({_written(before + parameter.name + between, tokens)} {value}){optional}")
    return " ".join(written)


def _written(text: str, tokens: Mapping[str, int]) -> str:
    """A fixed text in Lark; special tokens stand in it by their ids."""
    if not text:
        return ""
    pieces = re.split("(" + "|".join(map(re.escape, tokens)) + ")", text) if tokens else [text]
    return " ".join(f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece) for piece in pieces if piece)


def _regex(text: str) -> str:
    """A fixed text inside of an expression between slashes."""
    return re.sub(r"[^\w\s<>\":=,]", lambda found: "\\" + found[0], text)
