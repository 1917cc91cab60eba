"""When a call is sent again and when it is over: plain data, a clock that the test sets, nobody waits."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import pytest

from seraph_client import Retries, Timeouts
from seraph_client.retries import Deadline, retry_after


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def response(status: int, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, request=httpx.Request("POST", "http://x"))


@pytest.mark.parametrize(
    ("failure", "waits", "waits_where_not_repeatable"),
    [
        (response(503), True, True),
        (response(429), True, True),
        (response(502), True, False),
        (response(408), True, False),
        (response(500), False, False),
        (response(504), False, False),
        (response(400), False, False),
        (response(401), False, False),
        (response(409), False, False),
        (response(500, x_should_retry="true"), True, True),
        (response(503, x_should_retry="False", retry_after="1"), False, False),
        (response(503, x_should_retry="perhaps"), True, True),
        (httpx.ConnectError("refused"), True, True),
        (httpx.ConnectTimeout("slow"), True, True),
        (httpx.RemoteProtocolError("closed"), True, False),
        (httpx.ReadError("reset"), True, False),
        (httpx.WriteError("reset"), True, False),
        (httpx.ReadTimeout("slow"), False, False),
        (httpx.PoolTimeout("full"), False, False),
    ],
)
def test_what_is_tried_again(
    failure: httpx.Response | httpx.TransportError, waits: bool, waits_where_not_repeatable: bool
) -> None:
    assert (Retries().delay(0, failure) is not None) == waits
    assert (Retries().delay(0, failure, repeatable=False) is not None) == waits_where_not_repeatable


def test_waits_double_up_to_a_limit_and_end() -> None:
    retries = Retries(max_retries=5, base_delay=1, max_delay=6, jitter=lambda: 0.0)
    assert [retries.delay(attempt, response(503)) for attempt in range(6)] == [1, 2, 4, 6, 6, None]
    assert Retries(base_delay=1, jitter=lambda: 0.999).delay(0, response(503)) == pytest.approx(0.5, abs=0.01)


def test_retry_after_takes_the_place_of_the_wait() -> None:
    retries = Retries(base_delay=1, max_delay=6)
    assert retries.delay(0, response(503, retry_after="5")) == 5
    assert retries.delay(0, response(429, retry_after="0")) == 0
    assert retries.delay(0, response(503, retry_after="7")) is None
    assert retries.delay(2, response(503, retry_after="0")) is None


def test_retry_after_header() -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert retry_after(date, now=lambda: 1445412475.0) == 5
    assert retry_after(date, now=lambda: 1445412500.0) == 0
    assert retry_after(" 3 ") == 3
    assert [retry_after(value) for value in (None, "", "soon", "-1", "1.5")] == [None] * 5


def test_a_wait_of_a_late_attempt_does_not_overflow() -> None:
    retries = Retries(max_retries=10_000, base_delay=1, max_delay=6, jitter=lambda: 0.0)
    assert retries.delay(9_999, response(503)) == 6


def test_a_deadline_cuts_what_each_step_may_take() -> None:
    clock = Clock()
    deadline = Deadline(Timeouts(connect=5, read=60, total=20), clock)
    assert deadline.for_attempt() == httpx.Timeout(20, connect=5)
    clock.now += 17
    assert deadline.for_attempt() == httpx.Timeout(3, connect=3)
    assert deadline.allows(2.9) and not deadline.allows(3)
    assert not deadline.has_passed()
    clock.now += 4
    assert deadline.has_passed()
    assert deadline.remaining() == 0
    assert not deadline.allows(0)


def test_a_call_without_a_total_time_has_no_end() -> None:
    clock = Clock()
    deadline = Deadline(Timeouts(connect=None, read=7), clock)
    clock.now += 1e9
    assert deadline.remaining() is None
    assert deadline.allows(1e9) and not deadline.has_passed()
    assert deadline.for_attempt() == httpx.Timeout(7, connect=None)
    assert Deadline(Timeouts(connect=None, read=None, total=4), clock).for_attempt() == httpx.Timeout(4)
