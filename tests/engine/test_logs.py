"""Log lines: text and JSON, request ids, whose messages are shown."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import warnings
from typing import Any

import pytest

from engine import logs
from tests.conftest import ConfigureLogs

ours = logging.getLogger("seraph.test")


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_text_lines_carry_the_request_they_concern(configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "text")
    ours.info("before")
    with logs.request("req-1"):
        ours.info("during %d", 7)
    ours.info("after")
    before, during, after = stream.getvalue().splitlines()
    assert before.endswith(" INFO seraph.test: before")
    assert during.endswith(" INFO seraph.test [req-1]: during 7")
    assert after.endswith(" INFO seraph.test: after")


def test_json_lines_are_objects_with_their_values(configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")
    with logs.request("req-1"):
        ours.warning("a %s", "line\nof two", extra=logs.extra(status=200, message="not this"))
    assert stream.getvalue().encode().startswith(logs.JSON_START)
    (line,) = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "seraph.test",
        "message": "a line\nof two",
        "request_id": "req-1",
        "status": 200,
    }


def test_an_exception_is_part_of_its_line(configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")
    try:
        raise ValueError("why")
    except ValueError:
        ours.exception("it failed", extra=logs.extra(kind=ValueError))
    (line,) = lines(stream)
    assert line["exception"].endswith("ValueError: why") and "Traceback" in line["exception"]
    assert line["kind"] == "<class 'ValueError'>"  # what JSON has no form for is text


async def test_tasks_keep_the_request_they_were_started_for(configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        ours.info(name)

    tasks = []
    for name in ("a", "b"):
        with logs.request(f"req-{name}"):
            tasks.append(asyncio.create_task(work(name)))
    await asyncio.gather(*tasks)
    assert [(line["message"], line["request_id"]) for line in lines(stream)] == [("a", "req-a"), ("b", "req-b")]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", {"ours debug", "ours info", "ours warning", "theirs info", "theirs warning"}),
        ("info", {"ours info", "ours warning", "theirs warning"}),
        ("warning", {"ours warning", "theirs warning"}),
        ("error", set()),
    ],
)
def test_levels(configure_logs: ConfigureLogs, level: str, shown: set[str]) -> None:
    stream = configure_logs(level, "json")
    assert logs.active_level() == level
    for owner, logger in (("ours", ours), ("theirs", logging.getLogger("library"))):
        for name in ("debug", "info", "warning"):
            logger.log(getattr(logging, name.upper()), "%s %s", owner, name)
    assert {line["message"] for line in lines(stream)} == shown


def test_libraries_warnings_become_lines(configure_logs: ConfigureLogs) -> None:
    stream = configure_logs("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = lines(stream)
    assert line["logger"] == "py.warnings" and "DeprecationWarning: old" in line["message"]


def test_what_nothing_caught_is_a_line_in_json(
    configure_logs: ConfigureLogs, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = configure_logs("info", "json")
    error = ZeroDivisionError("a bug")
    sys.excepthook(type(error), error, None)
    (line,) = lines(stream)
    assert line["level"] == "critical" and "ZeroDivisionError: a bug" in line["exception"]
    configure_logs("info", "text")
    assert sys.excepthook is sys.__excepthook__


def test_the_last_configuration_counts(configure_logs: ConfigureLogs) -> None:
    first = configure_logs("info", "json")
    assert logs.active_format() == "json"
    second = configure_logs("info", "text")
    assert logs.active_format() == "text"
    ours.info("once")
    assert first.getvalue() == "" and second.getvalue().count("once") == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/v1/models", "/v1/models"),
        ("/a\n2026 INFO forged", "/a\\n2026 INFO forged"),
        ("/\x1b[31m", "/\\x1b[31m"),
        ("x" * 600, "x" * 500 + "..."),
    ],
)
def test_a_callers_text_stays_on_its_line(text: str, line: str) -> None:
    assert logs.one_line(text) == line
