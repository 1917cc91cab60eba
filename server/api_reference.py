"""docs/api.md, written from the routes and the table of fields: `python -m server.api_reference`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from server.app import create_app
from server.openapi import BODIES
from server.schemas.chat import Message
from server.schemas.common import StreamOptions
from server.schemas.conversation import ToolCall
from server.schemas.fields import MESSAGE_FIELDS, STREAM_OPTION_FIELDS, Field, Table, Use
from server.settings import Settings

HEAD = """\
# The HTTP API

*This page is written from the routes and `server/schemas/fields.py` by `make docs`.*

`/docs` shows it in a browser, `/openapi.json` describes it for programs, with an example of every body and answer.

Requests are JSON, with `content-type: application/json`. Where the server has keys, they carry one as
`Authorization: Bearer KEY` or `x-api-key: KEY`; `/health` and the documentation need none, `/admin` needs its own.
`x-request-id` is kept where it is sent, and always sent back.

## Fields

Every field that the OpenAI API and vLLM's extensions of it know is one of three:

* **works**: it does what its API says;
* **hint**: it is valid, counted in a metric, and without effect on the answer;
* **refused**: a request that asks for something by it is answered with 400, because to ignore it would change the
  answer. Null, and the values named, ask for nothing.

A name that is none of these is ignored and reported in the header `x-seraph-ignored`, or refused with
`--strict-fields`. Null means a field's default throughout.

## Errors

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}

`param` is the field that is wrong, as a path (`messages.0.content`). An error in the middle of a stream is its last
event. 503 says in `retry-after` when to come back.

## Streams

With `stream`, chat and completions answer with server-sent events: chunks, then `data: [DONE]`. The text of one step
goes out at once, in one write. While there is nothing to send, a comment (`: keep-alive`) shows that the connection
lives. A caller that goes away, or that reads nothing for `--send-timeout`, has its request aborted.
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD]
    document = create_app(Settings(model=("m",)), []).openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            sections.append(f"## {method.upper()} {path}\n\n{operation['description']}\n")
            if path in BODIES and method == "post":
                sections.append(_fields(BODIES[path].fields, BODIES[path].model_json_schema()))
                if path == "/v1/chat/completions":
                    sections.append(f"### Messages\n\n{_fields(MESSAGE_FIELDS, Message.model_json_schema())}")
                    called = ToolCall.model_json_schema()
                    rows = [_row(name, "", _what(called["properties"][name], called)) for name in called["properties"]]
                    sections.append(f"### Calls of tools in messages\n\n{_table(('field', '', 'what'), rows)}")
                if path == "/v1/completions":
                    options = _fields(STREAM_OPTION_FIELDS, StreamOptions.model_json_schema())
                    sections.append(f"### stream_options, of chat and completions\n\n{options}")
    return "\n".join(sections)


def _fields(table: Table, schema: dict[str, Any]) -> str:
    """The fields of a body, those that work first."""
    order = [name for use in Use for name, field in table.items() if field.use is use]
    rows = []
    for name in order:
        field = table[name]
        what = _what(schema["properties"][name], schema) if field.use is Use.WORKS else _why(field)
        if name in schema.get("required", ()):
            what = f"**needed**; {what}"
        rows.append(_row(name, field.use.value, what))
    return _table(("field", "", "what"), rows)


def _row(name: str, use: str, what: str) -> tuple[str, str, str]:
    return (f"`{name}`", use, what)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _why(field: Field) -> str:
    if field.use is Use.HINT:
        return ""
    allowed = " or ".join(f"`{json.dumps(value)}`" for value in field.no_ops)
    return f"{field.reason}{f'; {allowed} asks for nothing' if allowed else ''}"


def _what(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """A field's type and bounds, then what it says of itself."""
    kind = " or ".join(dict.fromkeys(_kinds(schema, whole)))
    said = schema.get("description", "")
    return f"{kind}. {said}" if said else kind


def _kinds(schema: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    for one in schema.get("anyOf", ()):
        if one.get("type") == "null":
            return [kind for other in schema["anyOf"] if other is not one for kind in _kinds(other, whole)]
    if "anyOf" in schema:
        return [kind for one in schema["anyOf"] for kind in _kinds(one, whole)]
    if "$ref" in schema:
        target = whole["$defs"][schema["$ref"].rpartition("/")[2]]
        return [target.get("title", "object")] if target.get("type") == "object" else _kinds(target, whole)
    if "enum" in schema or "const" in schema:
        return ["one of " + ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))]
    kind = {"array": "list", "object": "object", "string": "text"}.get(
        schema.get("type", ""), schema.get("type", "any")
    )
    if kind == "list":
        kind = "list of " + " or ".join(_kinds(schema["items"], whole))
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (
            *(("minimum", "at least"), ("maximum", "at most"), ("exclusiveMaximum", "below")),
            *(("minLength", "characters: at least"), ("maxLength", "characters: at most")),
            *(("minItems", "at least"), ("maxItems", "at most"), ("maxProperties", "names: at most")),
        )
        if key in schema
    ]
    return [f"{kind} ({', '.join(bounds)})" if bounds else str(kind)]


if __name__ == "__main__":
    print(page(), end="")
