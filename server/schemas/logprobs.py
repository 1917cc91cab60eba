"""Log-probabilities in answers: the OpenAI API's shapes of chat and completions, and vLLM's of prompts.

They are the model's own, before penalties, bias, temperature and selections, as vLLM's are unless it is told
otherwise; the OpenAI API does not say. A token whose bytes are no text by themselves, because it ends or begins within
a character, is written as the OpenAI API writes it: `bytes:\\xf0\\x9f`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from engine.request import TokenLogprobs

LEAST = -9999.0
"""What the OpenAI API and vLLM write where a token is next to impossible; JSON has no infinity."""


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of the tokens of a chat answer, in order."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Of the tokens of a completion, in order; null for a prompt's first token, which nothing predicts.

    `text_offset` is where a token begins in the choice's text, in characters.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""Of a prompt's tokens, by token id: the token's own and those of the most likely ones; null for the first."""


class TokenText(Protocol):
    """What is needed of a model's text side."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token contributes to text."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of an answer."""

    logprobs: TokenLogprobs
    offset: int  # characters of the choice's own text before it


@dataclass(frozen=True, slots=True)
class LogprobWriter:
    """Writes log-probabilities of one request's answer. `as_ids`: tokens as `token_id:7` instead of their text."""

    text: TokenText
    as_ids: bool = False

    def chat(self, tokens: Iterable[ScoredToken]) -> ChatLogprobs:
        content: list[TokenLogprob] = []
        for token in tokens:
            own = token.logprobs
            top = [self._top(token_id, logprob) for token_id, logprob in own.top]
            content.append({**self._top(own.token_id, own.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion(
        self, tokens: Sequence[ScoredToken], *, offset: int = 0, prompt: CompletionLogprobs | None = None
    ) -> CompletionLogprobs:
        """Of tokens whose text has `offset` characters before it; after those of the `prompt`, where it is echoed."""
        written = prompt or _nothing()
        for token in tokens:
            self._append(written, token.logprobs, offset + token.offset, len(token.logprobs.top))
        return written

    def echo(
        self, prompt_token_ids: Sequence[int], offsets: Sequence[int], logprobs: Sequence[TokenLogprobs], count: int
    ) -> CompletionLogprobs:
        """Of a prompt's tokens, each with `count` of the most likely ones."""
        written = _nothing()
        written["text_offset"].append(offsets[0])
        written["token_logprobs"].append(None)
        written["tokens"].append(self.spell(prompt_token_ids[0]))
        written["top_logprobs"].append(None)
        for own, offset in zip(logprobs, offsets[1:], strict=True):
            self._append(written, own, offset, count)
        return written

    def prompt(self, logprobs: Sequence[TokenLogprobs], count: int) -> PromptLogprobs:
        """Of a prompt's tokens, as vLLM writes them."""
        written: PromptLogprobs = [None]
        for own in logprobs:
            entry = {own.token_id: self._prompt_logprob(own.token_id, own.logprob, own.rank)}
            for rank, (token_id, logprob) in enumerate(own.top[:count], start=1):
                entry.setdefault(token_id, self._prompt_logprob(token_id, logprob, rank))
            written.append(entry)
        return written

    def spell(self, token_id: int) -> str:
        """A token as text."""
        if self.as_ids:
            return f"token_id:{token_id}"
        piece = self.text.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        return {
            "token": self.spell(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self.text.token_bytes(token_id)),
        }

    def _append(self, written: CompletionLogprobs, own: TokenLogprobs, offset: int, count: int) -> None:
        token = self.spell(own.token_id)
        top: dict[str, float] = {}
        # Of tokens that read alike the most likely one counts. The token itself is there, likely or not.
        for token_id, logprob in own.top[:count]:
            top.setdefault(self.spell(token_id), _finite(logprob))
        top.setdefault(token, _finite(own.logprob))
        written["text_offset"].append(offset)
        written["token_logprobs"].append(_finite(own.logprob))
        written["tokens"].append(token)
        written["top_logprobs"].append(top)

    def _prompt_logprob(self, token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.spell(token_id)}


def _nothing() -> CompletionLogprobs:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST
