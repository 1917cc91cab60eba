"""A streamed chat as a user lives it: when text came, how much there was, and what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Heard:
    """One streamed answer. Times are seconds; gaps follow one another."""

    text: str = ""
    time_to_first_token: float | None = None
    gaps: list[float] = field(default_factory=list)  # between two events with text: inter-token latency
    num_counted_tokens: int | None = None  # the server's count, which comes at the end
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None  # why the answer is incomplete

    @property
    def num_tokens(self) -> int:
        """The server's count; of an answer that did not end, the number of events with text."""
        if self.num_counted_tokens is not None:
            return self.num_counted_tokens
        return len(self.gaps) + (self.time_to_first_token is not None)


def listen(heard: Heard, lines: Iterable[bytes], *, asked_at: float, clock: Callable[[], float]) -> None:
    """Read the lines of an event stream to its end into `heard`, which is current at any moment.

    An error in the stream, or a missing end, is left in `heard.error`.
    """
    heard.error = "the stream broke off"
    last = asked_at
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        now = clock()
        data = line[5:].strip()
        if data == b"[DONE]":
            heard.error = None
            break
        try:
            text = _take(heard, data)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            heard.error = f"not an event of the API: {data[:200]!r}"
            break
        if text is None:
            break
        if text:
            heard.text += text
            if heard.time_to_first_token is None:
                heard.time_to_first_token = now - asked_at
            else:
                heard.gaps.append(now - last)
            last = now


def _take(heard: Heard, data: bytes) -> str | None:
    """Note what an event says; its text, or None where it is an error."""
    event = json.loads(data)
    if (error := event.get("error")) is not None:
        heard.error = str(error["message"])
        return None
    if (usage := event.get("usage")) is not None:
        heard.num_counted_tokens = usage["completion_tokens"]
        heard.num_prompt_tokens = usage["prompt_tokens"]
        heard.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    choices = event["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""
