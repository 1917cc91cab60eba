"""What an answer's text says, as it comes: reasoning, content, and calls of tools with their arguments.

Whole answers and streams are read by the same parser, and what it gives does not depend on how the text was cut. The
text was held to the same ToolFormat by a grammar, so nothing here guesses; only its end may come anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import EngineError
from engine.text.tool_formats import THINK, THINK_END, ToolFormat, parameters_of


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of a call's arguments: as the model wrote it, but for what it wrote one by one."""

    index: int
    text: str


Event = Reasoning | Content | CallBegin | Arguments


class AnswerParser:
    """Reads one answer. `tools` None: no calls are looked for. `schemas` are those that the grammar was made of.

    With `reasons`, an answer may begin with <think>; with `in_reasoning` the prompt has written that already. White
    space around reasoning and before calls belongs to neither.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        reasons: bool = False,
        in_reasoning: bool = False,
    ) -> None:
        self._tools = tools
        self._schemas = schemas or {}
        self._buffer = ""
        self._events: list[Event] = []
        self._step = self._lead if in_reasoning else self._start if reasons else self._text
        self._literal = ""  # to come next, in _fixed
        self._object = _ObjectEnd()
        self._texts: set[str] = set()  # parameters of the call that are written as text
        self._is_text = False  # the one that is being read
        self._num_parameters = 0
        self.num_calls = 0
        """Calls that have begun."""

    def feed(self, text: str) -> list[Event]:
        """Take more text; what is certain by now."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Event]:
        """The text has ended: what was held back."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> list[Event]:
        while self._step(final):
            pass
        events, self._events = self._events, []
        return events

    # Each state takes what it can from the buffer, and is True where another one goes on.

    def _start(self, final: bool) -> bool:
        begun = self._buffer.lstrip()
        if begun.startswith(THINK):
            self._buffer = begun[len(THINK) :]
            self._step = self._lead
            return True
        if THINK.startswith(begun) and not final:
            return False
        self._step = self._text
        return True

    def _lead(self, final: bool) -> bool:
        self._buffer = self._buffer.lstrip()
        self._step = self._reasoning if self._buffer else self._step
        return bool(self._buffer)

    def _reasoning(self, final: bool) -> bool:
        found = self._take_until(THINK_END, final)
        if found[0]:
            self._events.append(Reasoning(found[0]))
        if found[1]:
            self._step = self._gap
        return found[1]

    def _gap(self, final: bool) -> bool:
        self._buffer = self._buffer.lstrip()
        self._step = self._text if self._buffer else self._step
        return bool(self._buffer)

    def _text(self, final: bool) -> bool:
        if self._tools is None:
            text, begins = self._buffer, False
            self._buffer = ""
        elif self._tools.only_first:
            if self._tools.begin.startswith(self._buffer) and self._buffer != self._tools.begin and not final:
                return False
            begins = self._buffer.startswith(self._tools.begin)
            text = "" if begins else self._buffer
            self._buffer = self._buffer[len(self._tools.begin) :] if begins else ""
            if not begins:
                self._tools = None
        else:
            text, begins = self._take_until(self._tools.begin, final)
        if text:
            self._events.append(Content(text))
        if begins:
            assert self._tools is not None
            self._expect(self._tools.opening + self._tools.before)
        return begins

    def _fixed(self, final: bool) -> bool:
        if self._buffer.startswith(self._literal):
            self._buffer = self._buffer[len(self._literal) :]
            self._step = self._name
            return True
        if not self._literal.startswith(self._buffer):
            raise self._broken()
        return False

    def _name(self, final: bool) -> bool:
        assert self._tools is not None
        name, found, rest = self._buffer.partition(self._tools.between)
        if not found:
            return False
        self._events.append(CallBegin(self.num_calls, name))
        self.num_calls += 1
        self._buffer, self._step, self._object = rest, self._arguments, _ObjectEnd()
        each = parameters_of(self._tools, self._schemas.get(name, {}))
        if each is not None:
            self._texts = {parameter.name for parameter in each if parameter.schema is None}
            self._num_parameters, self._step = 0, self._parameter
        return True

    def _parameter(self, final: bool) -> bool:
        assert self._tools is not None and self._tools.parameter is not None
        before, between, _ = self._tools.parameter
        begin = ", " if self._num_parameters else "{"
        if self._buffer.startswith(before):
            name, found, rest = self._buffer[len(before) :].partition(between)
            if not found:
                return False
            self._is_text = name in self._texts
            self._argue(f"{begin}{json.dumps(name, ensure_ascii=False)}: " + '"' * self._is_text)
            self._num_parameters += 1
            self._buffer, self._step = rest, self._value
            return True
        if before.startswith(self._buffer):
            return False
        self._argue("}" if self._num_parameters else "{}")
        self._step = self._after
        return True

    def _value(self, final: bool) -> bool:
        assert self._tools is not None and self._tools.parameter is not None
        text, ends = self._take_until(self._tools.parameter[2], False, strips=False)
        if self._is_text:
            text = json.dumps(text, ensure_ascii=False)[1:-1] + '"' * ends
        self._argue(text)
        self._step = self._parameter if ends else self._step
        return ends

    def _argue(self, text: str) -> None:
        if text:
            self._events.append(Arguments(self.num_calls - 1, text))

    def _arguments(self, final: bool) -> bool:
        size = self._object.find(self._buffer)
        text = self._buffer if size is None else self._buffer[:size]
        self._argue(text)
        self._buffer = self._buffer[len(text) :]
        if size is None:
            return False
        self._step = self._after
        return True

    def _after(self, final: bool) -> bool:
        assert self._tools is not None
        closed = self._tools.end + self._tools.close
        further = closed if self._tools.separator is None else self._tools.end + self._tools.separator
        if self._tools.separator is not None and self._buffer.startswith(further):
            self._buffer = self._buffer[len(further) :]
            self._expect(self._tools.before)
            return True
        if not any(each.startswith(self._buffer) for each in (closed, further)):
            raise self._broken()
        return False

    def _expect(self, literal: str) -> None:
        self._literal, self._step = literal, self._fixed

    def _take_until(self, marker: str, final: bool, *, strips: bool = True) -> tuple[str, bool]:
        """Text up to a marker without the white space before it, or what cannot belong to one; and whether it came."""
        at = self._buffer.find(marker)
        if at >= 0:
            text = self._buffer[:at]
            self._buffer = self._buffer[at + len(marker) :]
            return text.rstrip() if strips else text, True
        size = len(self._buffer)
        if not final:
            longest = min(len(marker) - 1, size)
            size -= next((n for n in range(longest, 0, -1) if self._buffer.endswith(marker[:n])), 0)
            size = len(self._buffer[:size].rstrip()) if strips else size
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        return text, False

    def _broken(self) -> EngineError:
        return EngineError(f"the answer left the format of its calls at {self._buffer[:40]!r}")


class _ObjectEnd:
    """Where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Take a piece; the number of its characters that belong to the object where it ends here, else None."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return i + 1
        return None
