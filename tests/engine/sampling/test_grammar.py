"""Grammars are translated and checked before an engine sees them: every kind, what is refused, and with which words."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import EngineError, RequestError
from engine.request import StructuredOutputs
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.limits import MAX_CHOICES, MAX_GRAMMAR_BYTES


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with GrammarCompiler() as compiler:
        yield compiler


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "asked",
    [
        StructuredOutputs(json=SCHEMA),
        StructuredOutputs(json=json.dumps(SCHEMA)),
        StructuredOutputs(json={}),
        StructuredOutputs(json=SCHEMA, disable_any_whitespace=True),
        StructuredOutputs(json_object=True),
        StructuredOutputs(regex=r"\d{3}-[a-z]+/\"x"),
        StructuredOutputs(choice=("yes", "no")),
        StructuredOutputs(choice=("", 'a "quoted" \\ one', "line\nbreak", "\0", "grüße 😀")),
        StructuredOutputs(grammar='start: "a" b\nb: /[0-9]+/'),
        StructuredOutputs(grammar='root ::= "a" digit\ndigit ::= [0-9]+'),
    ],
    ids=lambda asked: str(asked)[18:60],
)
def test_every_kind(compiler: GrammarCompiler, asked: StructuredOutputs) -> None:
    grammar = compiler.compile(asked)
    assert json.loads(grammar)["grammars"]
    assert compiler.cached(asked) == grammar == compiler.compile(asked)


def test_a_schema_as_text_is_that_schema(compiler: GrammarCompiler) -> None:
    text = json.dumps(SCHEMA, indent=3)
    assert compiler.compile(StructuredOutputs(json=text)) == compiler.compile(StructuredOutputs(json=SCHEMA))


@pytest.mark.parametrize(
    ("asked", "code", "message"),
    [
        (StructuredOutputs(), None, "exactly one of .*, got none"),
        (StructuredOutputs(regex="a", choice=("b",)), None, "got regex and choice"),
        (StructuredOutputs(json={"not": {}}), "unsupported_keyword", "not supported: not"),
        (StructuredOutputs(json={"type": "array", "uniqueItems": True}), "unsupported_keyword", "uniqueItems"),
        (StructuredOutputs(json={"items": {"contains": {}}}), "unsupported_keyword", "contains"),
        (StructuredOutputs(json={"oneOf": [{}, {}]}), "unsupported_keyword", "oneOf"),
        (StructuredOutputs(json={"oneOf": [{}, {}], "x-guidance": {"coerce_one_of": True}}), "unsupported_keyword", ""),
        (StructuredOutputs(json={"not": {}, "x-guidance": {"lenient": True}}), "unsupported_keyword", "not"),
        (StructuredOutputs(json={"format": "nonesuch", "type": "string"}), "invalid_grammar", "nonesuch"),
        (StructuredOutputs(json={"$ref": "https://example.com/schema"}), "invalid_grammar", "example.com"),
        (StructuredOutputs(json={"$ref": "#/$defs/none"}), "invalid_grammar", "does not exist"),
        (StructuredOutputs(json={"properties": {"a": False}, "required": ["a"], "type": "object"}), None, "unsatis"),
        (StructuredOutputs(json={"type": 5}), "invalid_grammar", ""),
        (StructuredOutputs(json="[]"), "invalid_grammar", "must be a JSON object"),
        (StructuredOutputs(json="{"), "invalid_grammar", "truncated"),
        (StructuredOutputs(regex="("), "invalid_grammar", "unclosed group"),
        (StructuredOutputs(regex=r"(?=a)b"), "invalid_grammar", "look-around"),
        (StructuredOutputs(regex=""), None, "between 1 and 65536 bytes, got 0"),
        (StructuredOutputs(regex="\ud800"), None, "surrogate"),
        (StructuredOutputs(choice=()), None, "between 1 and 4096 choices, got 0"),
        (StructuredOutputs(choice=("a",) * (MAX_CHOICES + 1)), None, "got 4097"),
        (StructuredOutputs(grammar="start: nonesuch"), "invalid_grammar", "nonesuch"),
        (StructuredOutputs(grammar='start: "a" <[2]>'), None, "tokens cannot be named"),
        (StructuredOutputs(grammar="start: <|im_end|>"), "invalid_grammar", "special token"),
        (StructuredOutputs(regex="x" * (MAX_GRAMMAR_BYTES + 1)), None, "got 65537"),
    ],
    ids=lambda value: str(value)[18:60] if isinstance(value, StructuredOutputs) else "",
)
def test_what_is_refused(compiler: GrammarCompiler, asked: StructuredOutputs, code: str | None, message: str) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(RequestError, match=f"(?is)^response_format.*{message}") as caught:
            compiler.compile(asked, "response_format")
        assert caught.value.param == "response_format"
        assert code is None or caught.value.code == code
        assert len(str(caught.value)) < 500


def test_text_that_looks_like_a_named_token_is_text(compiler: GrammarCompiler) -> None:
    compiler.compile(StructuredOutputs(grammar='start: "<[2]>" /<[3]>/ // <[4]>'))


def _chain(line: str, last: str, length: int) -> str:
    return "start: R0\n" + "\n".join(line.replace("I", str(i)).replace("J", str(i + 1)) for i in range(length)) + last


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "too many items": StructuredOutputs(grammar="start: " + " ".join(['"a"?'] * 6000)),
    "deep schema": StructuredOutputs(json=_nested(900)),
    "chained references": StructuredOutputs(
        json={"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1300)} | {"d1300": {}}}
        | {"$ref": "#/$defs/d0"}
    ),
    "chained rules": StructuredOutputs(grammar="start: r0\n" + _chain("rI: rJ", '\nr3000: "a"', 3000)[10:]),
    "chained expressions": StructuredOutputs(grammar=_chain("RI: RJ*", '\nR2500: "a"', 2500)),
    "patterns that must all match": StructuredOutputs(
        json={"type": "string", "allOf": [{"pattern": f"a{i}"} for i in range(1500)]}
    ),
    "a large multiple": StructuredOutputs(json={"type": "integer", "multipleOf": 10**9 + 7}),
    "a product of alternatives": StructuredOutputs(
        json={
            "allOf": [
                {"anyOf": [{"properties": {f"a{j}": {"type": "integer", "minimum": i}}} for j in range(8)]}
                for i in range(8)
            ]
        }
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_in_time_and_the_next_one_is_served(compiler: GrammarCompiler, name: str) -> None:
    started = time.process_time()
    with pytest.raises(RequestError, match=r"structured_outputs: .*(limit|nested|processor|fuel|large|memory|items)"):
        compiler.compile(HOSTILE[name])
    assert time.process_time() - started < 1  # of ours: the work was another process's
    compiler.compile(StructuredOutputs(regex=f"still{len(name)}"))


def test_many_threads_ask_one_compiler(compiler: GrammarCompiler) -> None:
    grammars: dict[int, str] = {}
    threads = [
        threading.Thread(
            target=lambda i=i: grammars.update({i: compiler.compile(StructuredOutputs(regex=f"t{i % 4}"))})
        )
        for i in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(grammars) == 16 and len(set(grammars.values())) == 4


def test_a_checker_that_was_killed_is_replaced() -> None:
    with GrammarCompiler() as compiler:
        compiler.compile(StructuredOutputs(regex="a"))
        assert compiler.pid is not None
        os.kill(compiler.pid, signal.SIGKILL)
        os.waitid(os.P_PID, compiler.pid, os.WEXITED | os.WNOWAIT)
        compiler.compile(StructuredOutputs(regex="b"))


def test_a_checker_that_cannot_run_is_our_error() -> None:
    asked = StructuredOutputs(regex="a")
    ends = (sys.executable, "-c", "raise SystemExit(3)")
    with GrammarCompiler(ends) as compiler, pytest.raises(EngineError, match="ended with status 3"):
        compiler.compile(asked)
    with GrammarCompiler(("/nonexistent",)) as compiler, pytest.raises(EngineError, match="could not be started"):
        compiler.compile(asked)
