"""The one table from exceptions to HTTP: status, error type and code of the OpenAI error body."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    ModelError,
    RequestError,
    SeraphError,
)

logger = logging.getLogger("seraph.server")


class AuthenticationError(RequestError):
    """The key is missing or wrong."""


class HostNotAllowedError(RequestError):
    """The Host header names a host this server does not answer for."""


class AdminClosedError(RequestError):
    """No key opens the operator's routes."""


class ForbiddenError(RequestError):
    """The operator has not allowed this."""


class ConflictError(RequestError):
    """What is asked for does not go with what the server is or does just now."""


class ModelNotFoundError(RequestError):
    """The request names a model that is not served here."""


class BodyTooLargeError(RequestError):
    """The body exceeds its route's limit."""


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""


class MediaTypeError(RequestError):
    """The body is not JSON by its content type."""


class NotReadyError(EngineError):
    """The engine is starting, or stopping."""


class DeadlineError(EngineError):
    """The request's deadline passed."""


class ClientDisconnectedError(SeraphError):
    """The caller went away; its answer goes nowhere."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one exception class, and what derives from it, leaves the server."""

    exception: type[Exception]
    status: int
    type: str
    code: str | None = None
    public: bool = True  # its message may be shown to callers


TABLE = (  # the first row whose class fits counts
    Row(AuthenticationError, 401, "authentication_error", "invalid_api_key"),
    Row(HostNotAllowedError, 403, "permission_error", "host_not_allowed"),
    Row(AdminClosedError, 403, "permission_error", "admin_closed"),
    Row(ForbiddenError, 403, "permission_error", "forbidden"),
    Row(ConflictError, 409, "invalid_request_error", "conflict"),
    Row(ModelNotFoundError, 404, "invalid_request_error", "model_not_found"),
    Row(BodyTimeoutError, 408, "invalid_request_error", "body_timeout"),
    Row(BodyTooLargeError, 413, "invalid_request_error", "body_too_large"),
    Row(MediaTypeError, 415, "invalid_request_error", "unsupported_media_type"),
    Row(RequestError, 400, "invalid_request_error"),
    Row(ClientDisconnectedError, 499, "invalid_request_error", "client_disconnected"),
    Row(EngineOverloadedError, 503, "server_error", "overloaded"),
    Row(NotReadyError, 503, "server_error", "not_ready"),
    Row(EngineDeadError, 503, "server_error", "engine_dead"),
    Row(DeadlineError, 504, "server_error", "deadline_exceeded"),
    Row(EngineError, 500, "server_error", "engine_error", public=False),
    Row(ModelError, 500, "server_error", "model_error", public=False),
    Row(ConfigError, 500, "server_error", "config_error", public=False),
    Row(HTTPException, 0, "invalid_request_error"),  # its own status
    Row(Exception, 500, "server_error", "internal_error", public=False),
)

RETRY_AFTER_SECONDS = 1.0
"""What a 503 without a better estimate advises."""


def row_of(error: Exception) -> Row:
    """The table's row for an exception."""
    return next(row for row in TABLE if isinstance(error, row.exception))


def status_of(error: Exception) -> int:
    return error.status_code if isinstance(error, HTTPException) else row_of(error).status


def error_body(error: Exception, request_id: str) -> dict[str, Any]:
    """The OpenAI error body. What is not the caller's to know is replaced by the request id and logged with it."""
    row = row_of(error)
    message, kind, code = str(error), row.type, row.code
    if isinstance(error, HTTPException):
        message = f"{HTTPStatus(error.status_code).phrase}."
        code = HTTPStatus(error.status_code).name.lower()
        if error.status_code >= 500:
            kind = "server_error"
    elif not row.public:
        logger.error("request %s failed", request_id, exc_info=error)
        message = f"The server failed to answer this request. Its log says more under request id {request_id}."
    if isinstance(error, RequestError):
        code = error.code or code
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": code}}


def error_response(error: Exception, request_id: str) -> Response:
    """The whole HTTP answer for an exception."""
    status = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 503:
        headers["retry-after"] = str(max(1, round(getattr(error, "retry_after", RETRY_AFTER_SECONDS))))
    if status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return Response(msgspec.json.encode(error_body(error, request_id)), status, headers, media_type="application/json")
