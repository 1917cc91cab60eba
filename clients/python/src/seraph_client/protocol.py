"""The API without I/O: requests to build, answers to read, errors to raise, when to try again.

`Client` and `AsyncClient` add the sending.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from seraph_client.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ProtocolError,
    SeraphClientError,
    StreamError,
    status_error_class,
)
from seraph_client.sse import EventDecoder
from seraph_client.types import Answer, Choice, Chunk, Messages, Model, Options, Prompt, Usage

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODELS = "/v1/models"
READY = "/health/ready"

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""Seconds. On a stream the read timeout holds between two pieces, keep-alives included."""

_MAX_QUOTED = 300

_CONNECTION_FAILURES = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.RemoteProtocolError,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """When to send a request again: after a connection that failed, 429 or 503, and never once an answer has begun.

    The wait doubles from `base_delay` seconds and is shortened at random by up to half; a Retry-After header takes its
    place. Where that asks for more than `max_delay` seconds the error is raised at once.
    """

    max_retries: int = 2
    base_delay: float = 0.5
    max_delay: float = 30.0
    jitter: Callable[[], float] = random.random  # in [0, 1)

    def delay(self, attempt: int, failure: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (0 is the first), or None to give up."""
        if attempt >= self.max_retries:
            return None
        if isinstance(failure, httpx.Response):
            if failure.status_code not in (429, 503):
                return None
            asked = retry_after(failure.headers.get("retry-after"))
            if asked is not None:
                return asked if asked <= self.max_delay else None
        elif not _never_answered(failure):
            return None
        return min(self.max_delay, self.base_delay * (1 << attempt)) * (1.0 - self.jitter() / 2)


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a Retry-After header asks for, given as seconds or as a date; None where it says nothing."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (ValueError, OverflowError):
        return None


def _never_answered(error: httpx.TransportError) -> bool:
    """Whether the request failed because of the connection. A read timeout is no such case: the server is at work."""
    return isinstance(error, _CONNECTION_FAILURES)


def normalize_base_url(base_url: str) -> str:
    """The server's address without the API's /v1, with which other clients want it."""
    return base_url.rstrip("/").removesuffix("/v1")


def headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def chat_body(messages: Messages, model: str, options: Options, *, stream: bool) -> dict[str, Any]:
    """The JSON body of a chat request."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return _body({"messages": [dict(message) for message in messages]}, model, options, stream=stream)


def completion_body(prompt: Prompt, model: str, options: Options, *, stream: bool) -> dict[str, Any]:
    """The JSON body of a completion request."""
    return _body({"prompt": prompt}, model, options, stream=stream)


def _body(read: dict[str, Any], model: str, options: Options, *, stream: bool) -> dict[str, Any]:
    named: dict[str, Any] = dict(options)
    extra = named.pop("extra", {})
    named.pop("model", None)
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return {"model": model, **read, **named, **streaming, **extra}


def connection_error(error: httpx.RequestError) -> APIConnectionError:
    """What a failure of the transport is raised as."""
    kind = APITimeoutError if isinstance(error, httpx.TimeoutException) else APIConnectionError
    return kind(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def status_error(response: httpx.Response) -> APIStatusError:
    """What an answer with an error status is raised as. Its body must have been read."""
    try:
        error = response.json()["error"]
        message, known = str(error["message"]), {key: error.get(key) for key in ("type", "code", "param")}
    except (ValueError, KeyError, TypeError, AttributeError):
        message, known = f"{response.status_code} {response.reason_phrase}: {_quoted(response.text)}", {}
    request_id = response.headers.get("x-request-id")
    return status_error_class(response.status_code)(
        message, status=response.status_code, request_id=request_id, **known
    )


def read_answer(response: httpx.Response) -> Answer:
    """The answer in a response of either endpoint. Raises ProtocolError."""
    return _read(response, _answer)


def read_models(response: httpx.Response) -> list[Model]:
    """The models in a response. Raises ProtocolError."""

    def models(value: Any) -> list[Model]:
        return [Model(id=one["id"], max_model_len=one.get("max_model_len")) for one in value["data"]]

    return _read(response, models)


def first_model(models: list[Model]) -> str:
    """The model of requests that name none."""
    if not models:
        raise ProtocolError("The server offers no model.")
    return models[0].id


def _read(response: httpx.Response, parse: Callable[[Any], T]) -> T:
    try:
        return parse(response.json())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ProtocolError(f"The answer is not what the API describes: {_quoted(response.text)}") from None


def _answer(value: Any) -> Answer:
    choices = [
        Choice(
            index=choice["index"],
            text=(choice["message"]["content"] or "") if "message" in choice else choice["text"],
            finish_reason=choice["finish_reason"],
        )
        for choice in value["choices"]
    ]
    choices.sort(key=lambda choice: choice.index)
    if not choices:
        raise ValueError("no choices")
    return Answer(id=value["id"], model=value["model"], choices=tuple(choices), usage=_usage(value["usage"]))


def _usage(value: Mapping[str, Any]) -> Usage:
    details = value.get("prompt_tokens_details") or {}
    return Usage(value["prompt_tokens"], value["completion_tokens"], details.get("cached_tokens") or 0)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


class StreamReader:
    """Chunks out of the bytes of a streamed answer."""

    def __init__(self) -> None:
        self._events = EventDecoder()
        self.id: str | None = None
        self.model: str | None = None
        self.usage: Usage | None = None
        self.is_done = False
        self.failure: SeraphClientError | None = None
        """To be raised once the chunks before it have been given out."""

    def feed(self, received: bytes) -> list[Chunk]:
        """The chunks that `received` completes, up to the answer's end or a failure."""
        chunks: list[Chunk] = []
        try:
            for data in self._events.feed(received):
                if self.is_done:
                    break
                if data == "[DONE]":
                    self.is_done = True
                else:
                    chunks += self._chunks(data)
        except SeraphClientError as failure:
            self.fail(failure)
        return chunks

    def fail(self, failure: SeraphClientError) -> None:
        """The answer cannot go on. What goes wrong once it is complete changes nothing."""
        if not self.is_done and self.failure is None:
            self.failure = failure

    def end(self) -> None:
        """The bytes have ended; a failure where the answer has not."""
        self.fail(APIConnectionError("The stream broke off before the answer was complete."))

    def _chunks(self, data: str) -> list[Chunk]:
        try:
            value = json.loads(data)
            if (error := value.get("error")) is not None:
                raise StreamError(
                    str(error["message"]), type=error.get("type"), code=error.get("code"), param=error.get("param")
                )
            self.id, self.model = value["id"], value["model"]
            if (usage := value.get("usage")) is not None:
                self.usage = _usage(usage)
            return [
                Chunk(
                    index=choice["index"],
                    text=(choice["delta"].get("content") or "") if "delta" in choice else choice["text"],
                    finish_reason=choice["finish_reason"],
                )
                for choice in value["choices"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProtocolError(f"An event is not what the API describes: {_quoted(data)}") from None
