"""The API without I/O: a `Call` for each thing to ask the server, with what to send and how to read what comes.

`Client` and `AsyncClient` add the sending.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from seraph_client import answers
from seraph_client.answers import Reply
from seraph_client.errors import (
    APIConnectionError,
    APITimeoutError,
    ModelFailedError,
    ProtocolError,
    SeraphClientError,
)
from seraph_client.options import (
    ChatOptions,
    CompletionOptions,
    EmbedOptions,
    Messages,
    ModelOptions,
    Options,
    Prompt,
    TextOptions,
    Texts,
    TokenizeOptions,
)
from seraph_client.retries import NEVER, Deadline, Retries, Timeouts
from seraph_client.types import Answer, Embeddings, LoadedModel, Model, Ranking, Scores, Tokens

VERSION = "0.1.0"

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUTS = Timeouts()

GENERATE, EMBED, SCORE = "generate", "embed", "score"
"""Kinds of models."""

_LOST = {
    "failed": "failed to load",
    "cancelled": "was given up",
    "dead": "died too often",
    "draining": "is being unloaded",
}
"""States that no model becomes ready from, in words."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One thing to ask the server.

    `repeatable`: asking twice does no more than asking once. `also` are statuses that are answers too. `by_operator`:
    it goes with the operator's key.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    body: Mapping[str, Any] | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    by_operator: bool = False
    also: tuple[int, ...] = ()
    retries: Retries | None = None  # in place of the client's

    def is_answer(self, response: httpx.Response) -> bool:
        return response.is_success or response.status_code in self.also


def normalize_base_url(base_url: str) -> str:
    """The server's address without the API's /v1, with which other clients want it."""
    return base_url.rstrip("/").removesuffix("/v1")


def headers(key: str | None) -> dict[str, str]:
    """Of every request that this key goes with."""
    named = {"user-agent": f"seraph-client/{VERSION}"}
    return named if key is None else {**named, "authorization": f"Bearer {key}"}


def as_timeouts(timeout: Timeouts | float) -> Timeouts:
    """A number is the whole call's."""
    return timeout if isinstance(timeout, Timeouts) else Timeouts(total=timeout)


def reply(response: httpx.Response, body: bytes) -> Reply:
    return Reply(response.status_code, response.reason_phrase, response.headers, body)


def failure_error(failure: httpx.Response | httpx.TransportError) -> SeraphClientError:
    """What a failed attempt is raised as where none follows. A response's body must have been read."""
    if isinstance(failure, httpx.Response):
        return answers.status_error(reply(failure, failure.content))
    return connection_error(failure)


def connection_error(error: httpx.RequestError, request_id: str | None = None) -> APIConnectionError:
    """What a failure of the transport is raised as."""
    kind = APITimeoutError if isinstance(error, httpx.TimeoutException) else APIConnectionError
    return kind(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, request_id=request_id)


def timeout_of(deadline: Deadline) -> httpx.Timeout:
    """What the transport may take for each step of an attempt. Raises APITimeoutError where the call is over."""
    if deadline.has_passed():
        raise deadline_error()
    return deadline.for_attempt()


def deadline_error(request_id: str | None = None) -> APITimeoutError:
    """What a call that has not ended in its total time is raised as."""
    return APITimeoutError("The call has not ended in its total time.", request_id=request_id)


# Generation


def chat(messages: Messages, model: str, options: ChatOptions, *, stream: bool = False) -> Call[Answer]:
    """The assistant's answer to a conversation."""
    body = _streaming({"messages": as_messages(messages)}, model, options, stream=stream)
    return Call("POST", "/v1/chat/completions", answers.answer, body)


def complete(prompt: Prompt, model: str, options: CompletionOptions, *, stream: bool = False) -> Call[Answer]:
    """The continuation of prompts."""
    return Call(
        "POST", "/v1/completions", answers.answer, _streaming({"prompt": prompt}, model, options, stream=stream)
    )


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]


def _streaming(read: Mapping[str, Any], model: str, options: Options, *, stream: bool) -> dict[str, Any]:
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return _body({**read, **streaming}, model, options)


def _body(read: Mapping[str, Any], model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields; what options name wins over `read`, and `extra` over both."""
    named = {name: value for name, value in options.items() if name not in ("model", "timeout", "extra")}
    return {"model": model, **read, **named, **options.get("extra", {})}


# Texts


def embed(texts: Prompt, model: str, options: EmbedOptions) -> Call[Embeddings]:
    """The vectors of texts or token ids."""
    body = _body({"input": texts, "encoding_format": "base64"}, model, options)
    return Call("POST", "/v1/embeddings", answers.embeddings, body)


def score(text_1: Texts, text_2: Texts, model: str, options: TextOptions) -> Call[Scores]:
    """How well the texts of each pair go together."""
    return Call("POST", "/v1/score", answers.scores, _body({"text_1": text_1, "text_2": text_2}, model, options))


def rerank(
    query: str,
    documents: Sequence[str],
    model: str,
    options: TextOptions,
    *,
    top_n: int | None = None,
    return_documents: bool = True,
) -> Call[Ranking]:
    """Documents by how well they answer a query."""
    read: dict[str, Any] = {"query": query, "documents": documents, "return_documents": return_documents}
    if top_n is not None:
        read["top_n"] = top_n
    return Call("POST", "/v1/rerank", answers.ranking, _body(read, model, options))


def tokenize(text: Messages, model: str, options: TokenizeOptions) -> Call[Tokens]:
    """The token ids of a text, or of a conversation as the chat template renders it."""
    read: dict[str, Any] = {"prompt": text} if isinstance(text, str) else {"messages": as_messages(text)}
    return Call("POST", "/tokenize", answers.tokens, _body(read, model, options))


def detokenize(tokens: Sequence[int], model: str, options: ModelOptions) -> Call[str]:
    """The text of token ids."""
    return Call("POST", "/detokenize", answers.prompt, _body({"tokens": list(tokens)}, model, options))


# The server


MODELS = Call("GET", "/v1/models", answers.models)
VERSION_OF_SERVER = Call("GET", "/version", answers.version)
HEALTH = Call("GET", "/health", answers.health, also=(503,), retries=NEVER)


def model(id: str) -> Call[Model]:
    """One model."""
    return Call("GET", f"/v1/models/{quote(id)}", answers.model)


def first_of_kind(models: Sequence[Model], kind: str | None) -> str:
    """The model of requests that name none: the server's first of a kind, None: of any. Raises ProtocolError.

    A server that tells no kinds is taken to have models that generate.
    """
    for each in models:
        if kind in (None, each.kind or GENERATE):
            return each.id
    raise ProtocolError("The server offers no model" + ("." if kind is None else f" of the kind {kind!r}."))


# The operator's


LOADED_MODELS = Call("GET", "/admin/models", answers.loaded_models, by_operator=True)


def loaded_model(name: str) -> Call[LoadedModel]:
    """One model as the operator sees it."""
    return Call("GET", f"/admin/models/{quote(name)}", answers.loaded_model, by_operator=True)


def load(source: str, *, name: str | None, kv_cache_memory: str | int | None) -> Call[LoadedModel]:
    """Begin to load a model."""
    given = {"model": source, "name": name, "kv_cache_memory": kv_cache_memory}
    body = {key: value for key, value in given.items() if value is not None}
    return Call("POST", "/admin/models", answers.loaded_model, body, repeatable=False, by_operator=True)


def unload(name: str, *, drain: float | None) -> Call[LoadedModel | None]:
    """Begin to unload a model."""
    params = {} if drain is None else {"drain": f"{drain:g}"}
    path = f"/admin/models/{quote(name)}"
    return Call("DELETE", path, answers.unloading, params=params, repeatable=False, by_operator=True)


def still(model: LoadedModel) -> APITimeoutError:
    """What a wait for a model that has not come to its end in time is raised as."""
    return APITimeoutError(f"The model {model.name!r} is still {model.state}.")


def is_ready(model: LoadedModel) -> bool:
    """Whether a model that is waited for has got there. Raises ModelFailedError where it will not."""
    if (what := _LOST.get(model.state)) is not None:
        raise ModelFailedError(f"The model {model.name!r} {what}" + (f": {model.reason}" if model.reason else "."))
    return model.state == "ready"
