"""Grammars of calls: what they let through is what the parser reads, in every format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.errors import RequestError
from engine.sampling.checker import EOS, _Bytes
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.limits import parser_limits
from engine.sampling.tool_grammar import tool_grammar
from engine.text.tool_formats import FORMATS, HERMES, MISTRAL, ToolFormat
from tests.engine.text.test_answer_parser import write

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a": {**CITY, "additionalProperties": False},
    "ab": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "additionalProperties": False},
}
GOOD = ("a", '{"city": "} <tool_call> \\" é"}')


def allows(grammar: str, text: str) -> bool:
    """Whether an answer of that text is complete."""
    tokenizer = LLTokenizer(_Bytes(), eos_token=[EOS])  # type: ignore[arg-type]
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_what_an_answer_may_be(form: ToolFormat) -> None:
    call = write(form, GOOD)
    auto, required, none = (tool_grammar(form, SCHEMAS, calls=calls) for calls in ("auto", "required", "none"))
    for text, expected in (
        ("", (True, False, True)),
        ("Hi {there} <tool", (True, False, True)),
        (call, (True, True, False)),
        (call[:-1], (False, False, False)),
        (call + "x", (False, False, False)),
        (write(form, ("b", "{}")), (False, False, False)),
        (write(form, ("a", "{}")), (False, False, False)),
        (write(form, ("ab", '{"n": 0}')), (False, False, False)),
        (write(form, ("ab", "{}")), (True, True, False)),
    ):
        assert tuple(allows(grammar, text) for grammar in (auto, required, none)) == expected, text
    if not form.only_first:
        assert allows(auto, "Well.\n" + call) and not allows(none, "Well.\n" + call)
    if form.separator is not None:
        two = write(form, GOOD, ("ab", '{"n":3}'))
        assert allows(auto, two) and allows(required, two)
        assert not allows(tool_grammar(form, SCHEMAS, calls="auto", several=False), two)
    only = tool_grammar(form, {"ab": SCHEMAS["ab"]}, calls="required")
    assert allows(only, write(form, ("ab", "{}"))) and not allows(only, call)


def test_reasoning_comes_first() -> None:
    call = write(HERMES, GOOD)
    for thinks, begin in (("may", "<think>"), ("must", "")):
        for calls in ("auto", "required"):
            grammar = tool_grammar(HERMES, SCHEMAS, calls=calls, thinks=thinks)  # type: ignore[arg-type]
            assert allows(grammar, f"{begin}\nA <tool_call> would do.\n</think>\n\n{call}")
            assert allows(grammar, call) is (thinks == "may")
            assert not allows(grammar, f"{begin}\nA <tool_call>")
            assert allows(grammar, f"{begin}a</think>Hi") is (calls == "auto")


def test_special_tokens_stand_by_their_ids() -> None:
    grammar = tool_grammar(MISTRAL, SCHEMAS, calls="auto", special={"[TOOL_CALLS]": 5})
    rules = json.loads(grammar)["grammars"][0]["lark_grammar"]
    assert "TEXT (<[5]> calls)?" in rules
    required = tool_grammar(MISTRAL, SCHEMAS, calls="required", special={"[TOOL_CALLS]": 5})
    assert "start: <[5]> calls" in json.loads(required)["grammars"][0]["lark_grammar"]


def test_the_compiler_names_the_tool() -> None:
    with GrammarCompiler() as compiler:
        good = tool_grammar(HERMES, SCHEMAS, calls="auto")
        assert not compiler.knows_tools(good)
        compiler.check_tools(good, {})
        assert compiler.knows_tools(good)
        bad = {**SCHEMAS, "worse": {"type": "object", "properties": {"x": {"not": {}}}}}
        fields = {name: (f"tools.{i}.function.parameters", schema) for i, (name, schema) in enumerate(bad.items())}
        for _ in range(2):
            with pytest.raises(RequestError, match=r"^tools\.2\.function\.parameters of worse: .* not\.$") as caught:
                compiler.check_tools(tool_grammar(HERMES, bad, calls="auto"), fields)
            assert caught.value.code == "unsupported_keyword"
            assert caught.value.param == "tools.2.function.parameters"
        huge = {"h": {"type": "object", "description": "x" * (128 << 10)}}
        with pytest.raises(RequestError, match="at most 131072 bytes together"):
            compiler.check_tools(tool_grammar(HERMES, huge, calls="auto"), {})
        assert not compiler.knows_tools(tool_grammar(HERMES, bad, calls="auto"))
