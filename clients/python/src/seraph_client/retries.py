"""When a call is over, when it is sent again, and how long that waits: decisions on plain data, without I/O."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout)
"""No server has seen the request."""

_CONNECTION_LOST = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
"""A server may be at work on it. (After a read timeout it is, and asking again would double the work.)"""

_REFUSED = (429, 503)
"""The server did nothing, for now."""

_UNDECIDED = (408, 502)
"""The request did not arrive whole, or what stands between did not reach the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds; None: without end.

    `connect` is for a connection, `read` for each piece of an answer (a stream's keep-alives are pieces), `total` for
    the whole call: its retries and the waits between them, and of a stream everything up to its last chunk.
    """

    connect: float | None = 5.0
    read: float | None = 600.0
    total: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """When to send a request again, never once an answer has begun.

    After 429, 503 and a connection that was not made; after a connection that broke, 408 and 502 only if the request
    may be repeated, as all may but the operator's. An `x-should-retry` header of the server decides over its status.

    The wait doubles from `base_delay` seconds and is shortened at random by up to half; a Retry-After header takes its
    place. Where that asks for more than `max_delay` seconds the error is raised at once.
    """

    max_retries: int = 2
    base_delay: float = 0.5
    max_delay: float = 30.0
    jitter: Callable[[], float] = random.random  # in [0, 1)

    def delay(
        self, attempt: int, failure: httpx.Response | httpx.TransportError, *, repeatable: bool = True
    ) -> float | None:
        """Seconds to wait after failed attempt number `attempt` (0 is the first), or None to give up."""
        if attempt >= self.max_retries or not _may_follow(failure, repeatable=repeatable):
            return None
        if isinstance(failure, httpx.Response):
            asked = retry_after(failure.headers.get("retry-after"))
            if asked is not None:
                return asked if asked <= self.max_delay else None
        return min(self.max_delay, self.base_delay * 2.0 ** min(attempt, 64)) * (1.0 - self.jitter() / 2)


NEVER = Retries(max_retries=0)


class Deadline:
    """The end of one call, by a clock that tests may set."""

    def __init__(self, timeouts: Timeouts, clock: Callable[[], float]) -> None:
        self._timeouts = timeouts
        self._clock = clock
        self._at = None if timeouts.total is None else clock() + timeouts.total

    def remaining(self) -> float | None:
        """Seconds until the call is over, 0 where it is, None where it has no end."""
        return None if self._at is None else max(0.0, self._at - self._clock())

    def has_passed(self) -> bool:
        return self.remaining() == 0

    def allows(self, delay: float) -> bool:
        """Whether something can still follow a wait of so many seconds."""
        remaining = self.remaining()
        return remaining is None or delay < remaining

    def for_attempt(self) -> httpx.Timeout:
        """What the transport may take for each of its steps, from now on."""
        remaining = self.remaining()

        def cut(seconds: float | None) -> float | None:
            return seconds if remaining is None else min(remaining, remaining if seconds is None else seconds)

        return httpx.Timeout(cut(self._timeouts.read), connect=cut(self._timeouts.connect))


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


def _may_follow(failure: httpx.Response | httpx.TransportError, *, repeatable: bool) -> bool:
    if not isinstance(failure, httpx.Response):
        return isinstance(failure, _NEVER_SENT) or (repeatable and isinstance(failure, _CONNECTION_LOST))
    match failure.headers.get("x-should-retry", "").strip().lower():
        case "true":
            return True
        case "false":
            return False
    status = failure.status_code
    return status in _REFUSED or (repeatable and status in _UNDECIDED)
