"""The OpenAPI document: what FastAPI knows of the routes, and what it cannot: bodies, streams, errors, examples."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from server.schemas import examples
from server.schemas.admin import LoadModelRequest
from server.schemas.chat import ChatCompletionRequest
from server.schemas.common import RequestBody
from server.schemas.completions import CompletionRequest
from server.schemas.embeddings import EmbeddingRequest
from server.schemas.scores import RerankRequest, ScoreRequest
from server.schemas.tokenization import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[RequestBody]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/score": ScoreRequest,
    "/v1/rerank": RerankRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/admin/models": LoadModelRequest,
}
"""Request bodies by path: handlers read them themselves, bounded and strictly."""

_ERROR_SCHEMA: dict[str, Any] = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong, as a path."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document of an application's routes; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        refs, definitions = models_json_schema(
            [(model, "validation") for model in BODIES.values()], ref_template="#/components/schemas/{model}"
        )
        schemas = document["components"]["schemas"]
        schemas.update(definitions["$defs"])
        schemas["Error"] = _ERROR_SCHEMA
        for path, model in BODIES.items():
            content = {"schema": refs[(model, "validation")], "example": examples.BODIES[path]}
            body = {"required": True, "content": {"application/json": content}}
            document["paths"][path]["post"]["requestBody"] = body
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _describe(method, path, operation["responses"])
        for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which no answer has
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _describe(method: str, path: str, responses: dict[str, Any]) -> None:
    """Give an operation's answers their examples, and its errors their one shape."""
    responses.pop("422", None)
    if (answer := examples.ANSWERS.get((method, path))) is not None:
        (success,) = responses.values()
        success["content"]["application/json"]["example"] = answer
        if method == "post" and path in examples.EVENTS:
            event = f"data: {json.dumps(examples.EVENTS[path])}\n\ndata: [DONE]\n\n"
            success["content"]["text/event-stream"] = {"schema": {"type": "string"}, "example": event}
    for status in ("4XX", "5XX"):
        content = {"schema": {"$ref": "#/components/schemas/Error"}, "example": examples.ERROR}
        responses[status] = {"description": "An error, as the OpenAI API has it.", "content": {
            "application/json": content
        }}  # fmt: skip
