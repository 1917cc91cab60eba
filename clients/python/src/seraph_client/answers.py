"""Answers of the server, read: every function takes a whole one and raises ProtocolError for that of something else."""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from seraph_client.errors import APIStatusError, ProtocolError, status_error_class
from seraph_client.types import (
    Answer,
    Choice,
    Embeddings,
    Health,
    LoadedModel,
    LoadedModels,
    Logprob,
    Model,
    Progress,
    PromptLogprob,
    PromptLogprobs,
    Ranked,
    Ranking,
    Scores,
    Tokens,
    ToolCall,
    Usage,
)

_MAX_QUOTED = 300

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer as it came."""

    status: int
    reason: str  # the status in words
    headers: Mapping[str, str]
    body: bytes

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


def status_error(reply: Reply) -> APIStatusError:
    """What an answer with an error status is raised as."""
    try:
        error = json.loads(reply.body)["error"]
        message, known = str(error["message"]), {key: error.get(key) for key in ("type", "code", "param")}
    except (ValueError, KeyError, TypeError, AttributeError):
        message, known = f"{reply.status} {reply.reason}: {quoted(reply.text)}", {}
    return status_error_class(reply.status)(message, status=reply.status, request_id=reply.request_id, **known)


def answer(reply: Reply) -> Answer:
    """Of chat and of completions."""
    return _read(reply, _answer)


def embeddings(reply: Reply) -> Embeddings:
    def read(value: Any) -> Embeddings:
        data = sorted(value["data"], key=lambda each: int(each["index"]))
        packed = tuple(_vector(each["embedding"]) for each in data)
        return Embeddings(value["model"], packed, value["usage"]["prompt_tokens"])

    return _read(reply, read)


def scores(reply: Reply) -> Scores:
    def read(value: Any) -> Scores:
        data = sorted(value["data"], key=lambda each: int(each["index"]))
        found = tuple(float(each["score"]) for each in data)
        return Scores(value["id"], value["model"], found, value["usage"]["prompt_tokens"])

    return _read(reply, read)


def ranking(reply: Reply) -> Ranking:
    def read(value: Any) -> Ranking:
        results = tuple(
            Ranked(each["index"], float(each["relevance_score"]), (each.get("document") or {}).get("text"))
            for each in value["results"]
        )
        return Ranking(value["id"], value["model"], results, value["usage"]["prompt_tokens"])

    return _read(reply, read)


def tokens(reply: Reply) -> Tokens:
    return _read(reply, lambda value: Tokens(tuple(map(int, value["tokens"])), value["max_model_len"]))


def prompt(reply: Reply) -> str:
    return _read(reply, lambda value: str(value["prompt"]))


def models(reply: Reply) -> list[Model]:
    return _read(reply, lambda value: [_model(each) for each in value["data"]])


def model(reply: Reply) -> Model:
    return _read(reply, _model)


def version(reply: Reply) -> str:
    return _read(reply, lambda value: str(value["version"]))


def health(reply: Reply) -> Health:
    """Also raises APIStatusError, for a 503 that says nothing of health: something stands before the server."""
    try:
        return _read(reply, lambda value: Health(value["status"], dict(value.get("models") or {})))
    except ProtocolError:
        if reply.status != 200:
            raise status_error(reply) from None
        raise


def loaded_models(reply: Reply) -> LoadedModels:
    def read(value: Any) -> LoadedModels:
        memory = value["memory"]
        found = tuple(_loaded_model(each) for each in value["data"])
        return LoadedModels(found, memory["limit_bytes"], memory["promised_bytes"])

    return _read(reply, read)


def loaded_model(reply: Reply) -> LoadedModel:
    return _read(reply, _loaded_model)


def unloading(reply: Reply) -> LoadedModel | None:
    """None where nothing is left of the model."""
    return None if reply.status == 204 else loaded_model(reply)


def usage(value: Mapping[str, Any]) -> Usage:
    """Of a whole answer's or a chunk's `usage`."""
    details = value.get("prompt_tokens_details") or {}
    return Usage(value["prompt_tokens"], value["completion_tokens"], details.get("cached_tokens") or 0)


def logprobs(value: Mapping[str, Any] | None) -> tuple[Logprob, ...] | None:
    """Of a choice of a chat or of a completion."""
    if value is None:
        return None
    if "content" in value:
        return tuple(_logprob(each) for each in value["content"])
    columns = (value[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"))
    return tuple(
        Logprob(token, logprob, tuple(Logprob(*one) for one in (top or {}).items()), offset=offset)
        for token, logprob, top, offset in zip(*columns, strict=True)
    )


def token_ids(value: list[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(map(int, value))


def quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")


def _read(reply: Reply, parse: Callable[[Any], T]) -> T:
    try:
        return parse(json.loads(reply.body))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ProtocolError(
            f"The answer is not what the API describes: {quoted(reply.text)}", request_id=reply.request_id
        ) from None


def _answer(value: Any) -> Answer:
    choices = [_choice({**value, **choice}) for choice in value["choices"]]
    choices.sort(key=lambda choice: choice.index)
    if not choices:
        raise ValueError("no choices")
    return Answer(id=value["id"], model=value["model"], choices=tuple(choices), usage=usage(value["usage"]))


def _choice(value: Mapping[str, Any]) -> Choice:
    """Of a choice, and what stands beside the choices: a chat's prompt."""
    message = value.get("message") or {}
    return Choice(
        index=value["index"],
        text=(message["content"] or "") if "message" in value else value["text"],
        finish_reason=value["finish_reason"],
        logprobs=logprobs(value.get("logprobs")),
        tool_calls=tuple(_tool_call(each) for each in message.get("tool_calls") or ()),
        reasoning=message.get("reasoning") or "",
        token_ids=token_ids(value.get("token_ids")),
        prompt_token_ids=token_ids(value.get("prompt_token_ids")),
        prompt_logprobs=_prompt_logprobs(value.get("prompt_logprobs")),
    )


def _tool_call(value: Mapping[str, Any]) -> ToolCall:
    function = value["function"]
    return ToolCall(value["id"], function["name"], function["arguments"])


def _prompt_logprobs(value: Any) -> PromptLogprobs | None:
    if value is None:
        return None
    return tuple(
        each and {int(id): PromptLogprob(one["decoded_token"], one["logprob"], one["rank"]) for id, one in each.items()}
        for each in value
    )


def _logprob(value: Any) -> Logprob:
    top = tuple(_logprob(each) for each in value.get("top_logprobs") or ())
    raw = value.get("bytes")
    return Logprob(value["token"], value["logprob"], top, raw=None if raw is None else bytes(raw))


def _vector(value: Any) -> array[float]:
    """float32 [dimensions], from numbers or from base64 of little-endian bytes."""
    if not isinstance(value, str):
        return array("f", value)
    vector = array("f")
    vector.frombytes(base64.b64decode(value, validate=True))
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


def _model(value: Any) -> Model:
    return Model(value["id"], value.get("max_model_len"), value.get("kind"), value.get("state"))


def _loaded_model(value: Any) -> LoadedModel:
    progress = value.get("progress")
    return LoadedModel(
        name=value["name"],
        names=tuple(value["names"]),
        source=value["source"],
        kind=value["kind"],
        state=value["state"],
        reason=value.get("reason"),
        progress=progress and Progress(progress["label"], progress["done_bytes"], progress["total_bytes"]),
        host=value.get("host"),
        pid=value["pid"],
        weights_bytes=value["weights_bytes"],
        kv_cache_bytes=value["kv_cache_bytes"],
        kv_cache_tokens=value["kv_cache_tokens"],
        max_model_len=value["max_model_len"],
    )
