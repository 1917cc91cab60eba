"""Log lines, as text or as JSON: the same for the server, the engine process and every library in either.

A line that concerns a request carries its id, which `request(...)` sets for what runs inside, tasks that are started
there included. `extra` takes values that JSON lines show as members of their own; the text of a message says what
people need of them.
"""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TextIO

import msgspec

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")

OURS = ("seraph", "engine", "server")
"""Loggers of this program, the ones that a level is set for."""

JSON_START = b'{"time":"'
"""How every JSON line begins: the engine process's lines are told apart from what else it writes by it."""

_request_id: ContextVar[str] = ContextVar("request_id", default="")


@contextmanager
def request(request_id: str) -> Iterator[None]:
    """Lines that are logged inside, by this task and by those it starts, concern this request."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def current_request() -> str:
    """The id of the request that this task works for; empty where it works for none."""
    return _request_id.get()


def extra(**values: Any) -> dict[str, Any]:
    """For `logger.info(..., extra=...)`: what a JSON line says beside its text."""
    return {"values": values}


def configure(level: str, format: str, stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (None: standard error), replacing what was set up before.

    `level` is one of LEVELS and counts for our own loggers; libraries say what is a warning, at level debug also what
    they say at info. Warnings of the `warnings` module become lines; so do, in JSON, exceptions that nothing caught.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(_add_request_id)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    ours = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(logging.INFO if ours < logging.INFO else max(ours, logging.WARNING))
    for name in OURS:
        logging.getLogger(name).setLevel(ours)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught if format == "json" else sys.__excepthook__


def active_format() -> str:
    """The format that `configure` was given; "text" where it was not called."""
    handlers = logging.getLogger().handlers
    return "json" if any(isinstance(handler.formatter, JsonFormatter) for handler in handlers) else "text"


def active_level() -> str:
    """Of LEVELS, the one that the engine's logger has."""
    number = logging.getLogger("seraph.engine").getEffectiveLevel()
    return next((level for level in reversed(LEVELS) if number >= getattr(logging, level.upper())), LEVELS[0])


class TextFormatter(logging.Formatter):
    """TIME LEVEL LOGGER [REQUEST ID]: MESSAGE, and below it the traceback, where there is one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s%(of_request)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        record.of_request = f" [{request_id}]" if request_id else ""
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; where they exist request_id, exception and values."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            line["request_id"] = request_id
        for name, value in getattr(record, "values", {}).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def one_line(text: str, limit: int = 500) -> str:
    """A caller's text, fit for a line: without breaks and other control characters, and not longer than `limit`."""
    printable = text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return printable if len(printable) <= limit else printable[:limit] + "..."


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = _request_id.get()
    return True


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger(OURS[0]).critical("uncaught %s", kind.__name__, exc_info=(kind, error, traceback))
