"""Client of a Seraph server: chat, completions and models, sync and async, whole and streamed."""

from seraph_client.async_client import AsyncClient, AsyncStream
from seraph_client.client import Client, Stream
from seraph_client.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    RequestTooLargeError,
    SeraphClientError,
    ServerError,
    StreamError,
)
from seraph_client.protocol import Retries
from seraph_client.types import Answer, Choice, Chunk, Message, Model, Options, Usage

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "Choice",
    "Chunk",
    "Client",
    "Message",
    "Model",
    "NotFoundError",
    "Options",
    "OverloadedError",
    "PermissionDeniedError",
    "ProtocolError",
    "RateLimitError",
    "RequestTooLargeError",
    "Retries",
    "SeraphClientError",
    "ServerError",
    "Stream",
    "StreamError",
    "Usage",
]
