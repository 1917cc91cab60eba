"""Grammars of calls: what they let through is what the parser reads, in every format."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from engine.errors import RequestError
from engine.sampling.checker import EOS, _Bytes
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.limits import parser_limits
from engine.sampling.tool_grammar import tool_grammar
from engine.text.answer_parser import Arguments, CallBegin, Content
from engine.text.tool_formats import FORMATS, HERMES, MISTRAL, ToolFormat
from tests.engine.text.test_answer_parser import read, write

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a": {**CITY, "additionalProperties": False},
    "ab": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "additionalProperties": False},
}
TOKENIZER = LLTokenizer(_Bytes(), eos_token=[EOS])  # type: ignore[arg-type]
LIKED = frozenset(b'<|tool_call|>/hink{}[]",:: \\\nTOOL_CALLS[ARGS]123abcityn"namerguts\\parme"')
"""Bytes that random texts are made of: those of markers, and of JSON."""

GOOD = ("a", '{"city": "} <tool_call> \\" é"}')


def allows(grammar: str, text: str) -> bool:
    """Whether an answer of that text is complete."""
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=parser_limits())
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


def test_json_beside_calls() -> None:
    content = json.dumps({"grammars": [{"json_schema": CITY}]})
    form = dataclasses.replace(HERMES, only_first=True)
    call, answer = write(HERMES, GOOD), '{"city": "<tool_call>"}'
    for thinks, begin in (("no", ""), ("may", "<think>a</think>\n"), ("must", "a</think>\n\n")):
        grammar = tool_grammar(form, SCHEMAS, calls="auto", content=content, thinks=thinks)  # type: ignore[arg-type]
        options = {"reasons": thinks != "no", "in_reasoning": thinks == "must"}
        assert allows(grammar, begin + call) and allows(grammar, begin + answer)
        assert not allows(grammar, begin + "Hi") and not allows(grammar, "\n" + call)
        assert read(form, begin + answer, **options)[-1] == Content(answer)
        assert read(form, begin + call, **options)[-2:] == [CallBegin(0, "a"), Arguments(0, GOOD[1])]


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


def walk(grammar: str, draw: random.Random, size: int) -> tuple[str, bool]:
    """A text of at most that many bytes that the grammar allows, and whether it is complete."""
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=parser_limits())
    tokens: list[int] = []
    while len(tokens) < size and not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(257) if mask[i // 8] >> i % 8 & 1 and (i in LIKED or i == EOS)]
        if not allowed:
            break
        token = draw.choice(allowed)
        if token == EOS and (not tokens or draw.random() < 0.5):
            token = draw.choice([i for i in allowed if i != EOS] or [EOS])
        if token == EOS:
            break
        assert matcher.consume_token(token)
        tokens.append(token)
    return bytes(tokens).decode(), matcher.is_accepting()


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_the_parser_reads_whatever_a_grammar_allows(form: ToolFormat) -> None:
    num_calls = 0
    for seed in range(40):
        draw = random.Random(seed)
        calls = draw.choice(["auto", "required", "required", "none"])
        thinks = draw.choice(["no", "may", "must"])
        grammar = tool_grammar(form, SCHEMAS, calls=calls, thinks=thinks, several=draw.random() < 0.7)  # type: ignore[arg-type]
        text, complete = walk(grammar, draw, 400)
        options = {"reasons": thinks != "no", "in_reasoning": thinks == "must"}
        events = read(None if calls == "none" else form, text, **options)
        assert read(None if calls == "none" else form, text, draw.randint(1, 5), **options) == events
        begun = [event.name for event in events if isinstance(event, CallBegin)]
        arguments = [event.text for event in events if isinstance(event, Arguments)]
        if complete:
            for name, each in zip(begun, arguments, strict=True):
                jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(each))
                num_calls += 1
    assert num_calls > 4
