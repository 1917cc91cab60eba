"""What requests take and answers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hi"}, and whatever else the API knows of messages."""

Messages = str | Sequence[Message]
"""A conversation; a string stands for one user message."""

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""Text or token ids, or several of either."""


class Options(TypedDict, total=False):
    """Fields of a request beside the model and what it is to read; the server's defaults hold for those left out."""

    model: str
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    ignore_eos: bool
    user: str
    extra: Mapping[str, Any]
    """Further fields, sent as they are."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; `completion_tokens` counts what was delivered, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's, found in the server's prefix cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a request."""

    index: int
    text: str
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    id: str
    model: str
    choices: tuple[Choice, ...]  # in the order of their index
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one choice of a streamed answer gained."""

    index: int
    text: str
    finish_reason: str | None  # set on the choice's last chunk


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server offers. `max_model_len`, in tokens, is None where the server does not tell it."""

    id: str
    max_model_len: int | None
