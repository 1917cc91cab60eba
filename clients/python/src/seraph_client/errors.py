"""Every exception this client raises on purpose.

SeraphClientError
├── APIConnectionError          no answer: refused, reset, broken off
│   └── APITimeoutError         no answer in time
├── APIStatusError              an answer with an error status (carries status, type, code, param)
│   ├── BadRequestError         400, and other 4xx without a class of their own
│   ├── AuthenticationError     401
│   ├── PermissionDeniedError   403
│   ├── NotFoundError           404
│   ├── ConflictError           409
│   ├── RequestTooLargeError    413
│   ├── RateLimitError          429
│   └── ServerError             5xx
│       └── OverloadedError     503
├── StreamError                 the server reported an error after the stream had begun (carries type, code, param)
├── ModelFailedError            a model that was waited for failed to load, or died
└── ProtocolError               the answer is not what the API describes

All carry `request_id`, the server's name for the request in its log; None where no answer began.
"""

from __future__ import annotations


class SeraphClientError(Exception):
    """Base of everything this client raises on purpose."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class APIConnectionError(SeraphClientError):
    """The server could not be reached, or its answer broke off."""


class APITimeoutError(APIConnectionError):
    """The server did not answer in time."""


class ModelFailedError(SeraphClientError):
    """A model that was waited for will not serve; the message says why, as far as the server does."""


class ProtocolError(SeraphClientError):
    """The answer is not what the API describes: most likely something else listens there."""


class StreamError(SeraphClientError):
    """The server reported an error after the stream had begun. What came before it is valid but incomplete."""

    def __init__(
        self,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id)
        self.type = type
        self.code = code
        self.param = param


class APIStatusError(SeraphClientError):
    """The server answered with an error.

    `type`, `code` and `param` are those of the API's error body, None where the answer had none.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message, request_id=request_id)
        self.status = status
        self.type = type
        self.code = code
        self.param = param


class BadRequestError(APIStatusError):
    """The request is wrong; `param` names the field."""


class AuthenticationError(APIStatusError):
    """The key is missing or wrong."""


class PermissionDeniedError(APIStatusError):
    """The server does not answer this caller."""


class NotFoundError(APIStatusError):
    """The model, or the address, does not exist."""


class ConflictError(APIStatusError):
    """What is asked for does not go with what the server is or does just now."""


class RequestTooLargeError(APIStatusError):
    """The request's body is larger than the server takes."""


class RateLimitError(APIStatusError):
    """Too many requests."""


class ServerError(APIStatusError):
    """The server failed a correct request."""


class OverloadedError(ServerError):
    """The server has no room, or no engine, now."""


STATUS_ERRORS: dict[int, type[APIStatusError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: RequestTooLargeError,
    429: RateLimitError,
    503: OverloadedError,
}
"""Statuses with a class of their own."""


def status_error_class(status: int) -> type[APIStatusError]:
    """The class that an error status is raised as."""
    return STATUS_ERRORS.get(status) or (ServerError if status >= 500 else BadRequestError)
