"""Reading a JSON body: bounded while it arrives, decoded strictly, validated, every field classed."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from engine.errors import RequestError
from server.errors import BodyTimeoutError, BodyTooLargeError, ClientDisconnectedError, MediaTypeError
from server.routes.service import Service
from server.schemas.common import RequestBody

B = TypeVar("B", bound=RequestBody)

IGNORED_HEADER = "x-seraph-ignored"
MAX_REPORTED = 32
"""Most names in the header that reports unknown fields."""

DRAIN_BYTES = 32 << 20
"""How much of a body that is too large is still read and dropped: a connection closed on unread data is reset, and the
caller would not see why."""

_decode = msgspec.json.Decoder().decode


async def read_body(request: Request, service: Service, model: type[B], *, limit: int) -> tuple[B, dict[str, str]]:
    """A validated body, and the headers that report what of it was ignored.

    JSON only, by its content type too: a web page cannot send that across origins without asking first. Raises
    RequestError (and what derives from it) naming the field.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise MediaTypeError(f"The content-type must be application/json, got {content_type[:100]!r}.")
    raw = await _read(request, limit=limit, seconds=service.settings.body_timeout)
    body = validate(decode(raw), model)
    found = body.inspect()
    if found.unknown and service.settings.strict_fields:
        name = found.unknown[0]
        raise RequestError(f"{_printable(name)} is not a field of this API.", param=name, code="unknown_parameter")
    for name in found.hints:
        service.metrics.count_field("hint", _indices_out(name))
    for name in found.unknown:
        service.metrics.count_field("unknown", _indices_out(_printable(name)))
    headers = {}
    if found.unknown:
        headers[IGNORED_HEADER] = ", ".join(_printable(name) for name in found.unknown[:MAX_REPORTED])
    return body, headers


def decode(raw: bytes) -> dict[str, Any]:
    """A JSON object. NaN, infinities, lone surrogates and nesting without end are malformed. Raises RequestError."""
    try:
        value = _decode(raw)
    except RecursionError:
        raise RequestError("The body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:  # msgspec's own errors and UnicodeDecodeError
        raise RequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError(f"The body must be a JSON object, got {_describe(value)}.", code="invalid_json")
    return value


def validate(value: dict[str, Any], model: type[B]) -> B:
    """The body as its model. Raises RequestError naming the first wrong field, what it should be and what it is."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(str(part) for part in first["loc"] if part != "[key]")[:256]
        if first["type"] == "missing":
            raise RequestError(f"{param} is missing.", param=param, code="missing_required_parameter") from None
        said = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        raise RequestError(
            f"{param} {said}, got {_describe(first['input'])}.", param=param, code="invalid_value"
        ) from None


async def _read(request: Request, *, limit: int, seconds: float) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared[:20]) > limit
    if too_large and "expect" in request.headers:
        raise _too_large(limit)  # the caller waits for our word before it sends anything
    chunks: list[bytes] = []
    received = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                received += len(chunk)
                if too_large or received > limit:
                    too_large = True
                    chunks.clear()
                    if received > DRAIN_BYTES:
                        break
                else:
                    chunks.append(chunk)
    except TimeoutError:
        raise BodyTimeoutError(f"The body did not arrive within {seconds:g} seconds.") from None
    except ClientDisconnect:
        raise ClientDisconnectedError("The caller disconnected while sending.") from None
    if too_large:
        raise _too_large(limit)
    return b"".join(chunks)


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body must be at most {limit} bytes.")


def _describe(value: Any) -> str:
    """A value for an error message: its JSON type, and itself where it is short and plain."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            text = repr(value)
            return text if len(text) <= 40 else "a number of " + str(len(text)) + " digits"
        case str():
            return f"text {value[:40]!r}" + ("..." if len(value) > 40 else "")
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def _printable(name: str) -> str:
    """A caller's field name, fit for a header."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "?", name[:64])


def _indices_out(name: str) -> str:
    """messages.3.annotations -> messages.annotations: one metric series, not one per message."""
    return re.sub(r"\.\d+\.", ".", name)
