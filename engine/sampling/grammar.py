"""From what a caller asks of an answer's form to the grammar that a Request carries.

Grammars follow llguidance: JSON schemas, regular expressions, choices, and context-free grammars as Lark or as GBNF
write them. They are translated and checked in a process of its own (checker.py); the engine compiles them once more,
for its model's tokens (masks.py).
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import msgspec

from engine.config import child_environment, our_packages
from engine.errors import EngineError, RequestError
from engine.request import StructuredOutputs
from engine.sampling.limits import CPU_SECONDS, MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_TOOLS_BYTES
from engine.sampling.question import Answer, Question

COMMAND = (sys.executable, "-P", "-m", "engine.sampling.checker")
"""-P: what lies in the current folder must not be taken for our packages."""

CACHE_ENTRIES = 256
"""Answers that are kept, refusals too."""

MAX_REASON = 300
"""Characters of the compiler's words that an error repeats."""

_UNIMPLEMENTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_ONE_OF = "oneOf constraints are not supported"
_NAMED_TOKEN = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|(<\[)')
"""Texts, expressions and comments of a Lark grammar, and last what names a token by its number."""


class GrammarCompiler:
    """Checks grammars one after another, with the process that does it. Safe to use from several threads.

    The process is started by the first question and again where a grammar took it down.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._cache: OrderedDict[Question, Answer] = OrderedDict()

    def cached(self, asked: StructuredOutputs, param: str = "structured_outputs") -> str | None:
        """As `compile` where the answer is known already, without waiting; else None."""
        answer = self._cache.get(question := _question(asked, param))
        return None if answer is None else _grammar(answer, question, param)

    def compile(self, asked: StructuredOutputs, param: str = "structured_outputs") -> str:
        """The grammar for `Request.grammar`. Blocks for milliseconds, at worst for seconds.

        Raises RequestError, naming `param`, for what is no grammar, is not implemented or exceeds the limits, and
        EngineError where no process can be started.
        """
        question = _question(asked, param)
        return _grammar(self._answer(question), question, param)

    def knows_tools(self, grammar: str) -> bool:
        """Whether `check_tools` passed this grammar already, and would not wait."""
        answer = self._cache.get(Question("tools", grammar))
        return answer is not None and not answer.error

    def check_tools(self, grammar: str, schemas: Mapping[str, tuple[str, dict[str, Any]]]) -> None:
        """Check a grammar of `tool_grammar`, made without special tokens. Blocks as `compile` does.

        `schemas` has for each tool's name the field that its schema came in, and the schema. Raises RequestError naming
        the tool, or all of them where no single one is to blame.
        """
        size = len(grammar.encode("utf-8", "surrogatepass"))
        if size > MAX_TOOLS_BYTES:
            raise RequestError(f"tools must be at most {MAX_TOOLS_BYTES} bytes together, got {size}.", param="tools")
        question = Question("tools", grammar)
        answer = self._answer(question)
        if not answer.error:
            return
        for name, (param, schema) in schemas.items():
            try:
                self.compile(StructuredOutputs(json=schema), param)
            except RequestError as error:
                said = str(error).removeprefix(param).lstrip(": ")
                raise RequestError(f"{param} of {name}: {said}", param=param, code=error.code) from None
        _grammar(answer, question, "tools")

    def _answer(self, question: Question) -> Answer:
        with self._lock:
            answer = self._cache.get(question)
            if answer is None:
                answer = self._cache[question] = self._ask(question)
                if len(self._cache) > CACHE_ENTRIES:
                    self._cache.popitem(last=False)
            return answer

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._lock:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: Question) -> Answer:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # killed from outside since the last question
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=child_environment(PYTHONPATH=our_packages()),
                    process_group=0,  # Ctrl-C is for us
                )
            except OSError as error:
                raise EngineError(f"the grammar checker could not be started: {error}") from error
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(msgspec.json.encode(question) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()  # ends with the process, which its own timer ends
        if line.endswith(b"\n"):
            return msgspec.json.decode(line, type=Answer)
        status = self._end()
        if status == -signal.SIGPROF:
            return Answer(error=f"it takes more than {CPU_SECONDS:g} s of a processor to compile")
        if status == -signal.SIGSEGV:
            return Answer(error="it is nested or chained too deeply")
        if status == -signal.SIGABRT:
            return Answer(error="it takes too much memory to compile")
        raise EngineError(f"the grammar checker ended with status {status}")

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # it ends at the end of its input
        process.stdout.close()
        return process.wait()


def _question(asked: StructuredOutputs, param: str) -> Question:
    """Raises RequestError unless exactly one kind is asked for, within the limits on size."""
    kinds = [kind for kind in ("json", "regex", "choice", "grammar") if getattr(asked, kind) is not None]
    if asked.json_object:
        kinds.append("json_object")
    if len(kinds) != 1:
        raise RequestError(
            f"{param} must have exactly one of json, json_object, regex, choice and grammar, "
            f"got {' and '.join(kinds) or 'none'}.",
            param=param,
        )
    (kind,) = kinds
    match kind:
        case "json_object":
            kind, text = "json", '{"type":"object"}'
        case "json":
            text = asked.json if isinstance(asked.json, str) else _encoded(asked.json, param)
        case "choice":
            assert asked.choice is not None
            if not 1 <= len(asked.choice) <= MAX_CHOICES:
                raise RequestError(
                    f"{param} must have between 1 and {MAX_CHOICES} choices, got {len(asked.choice)}.", param=param
                )
            text = _encoded(list(asked.choice), param)
        case _:
            text = asked.regex if kind == "regex" else asked.grammar  # type: ignore[assignment]
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds half of a surrogate pair, which is no character.", param=param) from None
    if not 0 < size <= MAX_GRAMMAR_BYTES:
        raise RequestError(f"{param} must have between 1 and {MAX_GRAMMAR_BYTES} bytes, got {size}.", param=param)
    if kind == "grammar" and any(match[1] for match in _NAMED_TOKEN.finditer(text)):
        raise RequestError(f"{param}: tokens cannot be named, only their text.", param=param)
    return Question(kind, text, not asked.disable_any_whitespace)


def _encoded(value: object, param: str) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise RequestError(f"{param} cannot be written as JSON: {error}.", param=param) from None


def _grammar(answer: Answer, question: Question, param: str) -> str:
    if not answer.error:
        return answer.grammar
    code = "invalid_grammar"
    if match := _UNIMPLEMENTED.search(answer.error):
        names = match[1].replace('"', "")
        reason, code = f"the schema has keywords that are not supported: {names}", "unsupported_keyword"
    elif _ONE_OF in answer.error:
        reason = "the schema has a keyword that is not supported: oneOf, unless its branches exclude one another"
        code = "unsupported_keyword"
    else:
        reason = " ".join(answer.error.replace("<non-verbose/>", "").split())
        reason = reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 3] + "..."
    raise RequestError(f"{param}: {reason.rstrip('.')}.", param=param, code=code)
