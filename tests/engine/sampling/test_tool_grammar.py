"""Grammars of calls: what they let through is what the parser reads, in every format."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from engine.errors import RequestError
from engine.sampling.checker import EOS, _Bytes
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.limits import parser_limits
from engine.sampling.tool_grammar import tool_grammar
from engine.text.answer_parser import Arguments, CallBegin, Content
from engine.text.tool_formats import FORMATS, HERMES, MISTRAL, QWEN3_CODER, ToolFormat, parameters_of
from tests.engine.text.test_answer_parser import read, write, write_arguments

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SCHEMAS: dict[str, dict[str, Any]] = {
    "a": {**CITY, "additionalProperties": False},
    "ab": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "additionalProperties": False},
}
TOKENIZER = LLTokenizer(_Bytes(), eos_token=[EOS])  # type: ignore[arg-type]
LIKED = frozenset(b'<|tool_call|>/hink{}[]",:: \\\nTOOL_CALLS[ARGS]123abcityn"namerguts=f\\parme"')
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


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_reasoning_comes_first(form: ToolFormat) -> None:
    call = write(form, GOOD)
    for thinks, begin in (("may", "<think>"), ("must", "")):
        for calls in ("auto", "required"):
            grammar = tool_grammar(form, SCHEMAS, calls=calls, thinks=thinks)  # type: ignore[arg-type]
            lead = "" if form.only_first and calls == "auto" else "\n\n"
            assert allows(grammar, f"{begin}\nA {form.begin} would do.\n</think>{lead}{call}")
            assert allows(grammar, call) is (thinks == "may")
            assert not allows(grammar, f"{begin}\nA {form.begin}")
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


@pytest.mark.parametrize("form", [HERMES, QWEN3_CODER], ids=lambda form: form.name)
def test_the_compiler_names_the_tool(form: ToolFormat) -> None:
    with GrammarCompiler() as compiler:
        good = tool_grammar(form, SCHEMAS, calls="auto")
        assert not compiler.knows_tools(good)
        compiler.check_tools(good, {})
        assert compiler.knows_tools(good)
        bad = {**SCHEMAS, "worse": {"type": "object", "properties": {"x": {"not": {}}}}}
        fields = {name: (f"tools.{i}.function.parameters", schema) for i, (name, schema) in enumerate(bad.items())}
        for _ in range(2):
            with pytest.raises(RequestError, match=r"^tools\.2\.function\.parameters of worse: .* not\.$") as caught:
                compiler.check_tools(tool_grammar(form, bad, calls="auto"), fields)
            assert caught.value.code == "unsupported_keyword"
            assert caught.value.param == "tools.2.function.parameters"
        huge = {"h": {"type": "object", "description": "x" * (128 << 10)}}
        with pytest.raises(RequestError, match="at most 131072 bytes together"):
            compiler.check_tools(tool_grammar(form, huge, calls="auto"), {})
        assert not compiler.knows_tools(tool_grammar(form, bad, calls="auto"))


def walk(grammar: str, draw: random.Random, size: int, end: str) -> tuple[str, bool]:
    """A text of some that many bytes that the grammar allows, and whether it is complete.

    `end` comes now and then where it may, for chance would hardly ever make it.
    """
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=parser_limits())
    tokens: list[int] = []
    while len(tokens) < size and not matcher.is_stopped():
        if end and draw.random() < 0.1 and matcher.validate_tokens(list(end.encode())) == len(end):
            assert matcher.consume_tokens(list(end.encode()))
            tokens += end.encode()
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
        text, complete = walk(grammar, draw, 400, "" if form.parameter is None else form.parameter[2])
        options = {"reasons": thinks != "no", "in_reasoning": thinks == "must"}
        tools = None if calls == "none" else form
        events = read(tools, text, schemas=SCHEMAS, **options)
        assert read(tools, text, draw.randint(1, 5), SCHEMAS, **options) == events
        begun = [event.name for event in events if isinstance(event, CallBegin)]
        arguments = [event.text for event in events if isinstance(event, Arguments)]
        if complete:
            for name, each in zip(begun, arguments, strict=True):
                jsonschema.Draft202012Validator(SCHEMAS[name]).validate(json.loads(each))
                num_calls += 1
    assert num_calls > 4


DEFINED = {"$defs": {"Sort": {"enum": ["new", "old"]}, "Page": {"type": "object", "properties": {"n": {}}}}}
ONE_BY_ONE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "Any"},
        "unit": {"enum": ["celsius", "fahr\nenheit é\U0001f600", ""]},
        "count": {"type": "integer", "maximum": 99},
        "day": {"type": "string", "pattern": "^[0-9]{2}$"},
        "odd": {"enum": ["a", 1, None]},
        "tag": {"enum": ["\n</parameter>\n"], "type": "string"},
        "sort": {"$ref": "#/$defs/Sort"},
        "page": {"$ref": "#/$defs/Page", "description": "Which"},
    },
    "required": ["text", "count"],
    **DEFINED,
}


def allows_arguments(schema: dict[str, Any], body: str) -> bool:
    grammar = tool_grammar(QWEN3_CODER, {"f": schema}, calls="required")
    return allows(grammar, f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>")


def test_arguments_one_by_one() -> None:
    text, count = "<parameter=text>\n?\n</parameter>\n", "<parameter=count>\n99\n</parameter>\n"
    for body, expected in (
        (text + count, True),
        (count + text, False),
        (text, False),
        (text + text + count, False),
        (text + count.replace("99", "100"), False),
        (text + count.replace("99", '"99"'), False),
        (text + count.replace("count", "other"), False),
        (text.replace("?", "</function>\n</tool_call>") + count, True),
        (text.replace("?", "x\n</parameter>\n") + count, False),
        (text + "<parameter=unit>\ncelsius\n</parameter>\n" + count, True),
        (text + "<parameter=unit>\nfahr\nenheit é\U0001f600\n</parameter>\n" + count, True),
        (text + "<parameter=unit>\n\n</parameter>\n" + count, True),
        (text + "<parameter=unit>\nkelvin\n</parameter>\n" + count, False),
        (text + count + '<parameter=day>\n"31"\n</parameter>\n', True),
        (text + count + "<parameter=day>\n31\n</parameter>\n", False),
        (text + count + "<parameter=odd>\nnull\n</parameter>\n", True),
        (text + count + "<parameter=odd>\na\n</parameter>\n", False),
        (text + count + '<parameter=tag>\n"\\n</parameter>\\n"\n</parameter>\n', True),
        (text + count + '<parameter=sort>\n"old"\n</parameter>\n', True),
        (text + count + '<parameter=page>\n{"n": [1,\n  2]}\n</parameter>\n', True),
        ('{"text": "x", "count": 1}', False),
    ):
        assert allows_arguments(ONE_BY_ONE, body) is expected, body
        if expected:
            events = read(QWEN3_CODER, f"<tool_call>\n<function=f>\n{body}</function>", schemas={"f": ONE_BY_ONE})
            assert isinstance(events[1], Arguments)
            jsonschema.Draft202012Validator(ONE_BY_ONE).validate(json.loads(events[1].text))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["\n</parameter>", "\n", "</", "\\", '"', "{", "é"]), max_size=6).map("".join))
def test_texts_come_back_as_they_were(text: str) -> None:
    arguments = {"text": text, "count": 1}
    written = write_arguments(QWEN3_CODER, json.dumps(arguments))
    can_be = (text + "\n</parameter>\n").index("\n</parameter>\n") == len(text)
    assert allows_arguments(ONE_BY_ONE, written) is can_be
    if can_be:
        events = read(QWEN3_CODER, f"<tool_call>\n<function=f>\n{written}</function>", schemas={"f": ONE_BY_ONE})
        assert isinstance(events[1], Arguments) and json.loads(events[1].text) == arguments


@pytest.mark.parametrize(
    "said",
    [
        {"minProperties": 1},
        {"anyOf": [{"required": ["text"]}]},
        {"additionalProperties": {"type": "string"}},
        {"properties": {}},
        {"properties": {"a b": {}}, "required": []},
        {"properties": {"a": True}, "required": []},
        {"required": ["text", "x"]},
        {"properties": {"text": {"$ref": "#/properties/text"}}, "required": []},
        {"properties": {"text": {"$id": "x"}}, "required": []},
    ],
    ids=str,
)
def test_other_schemas_are_those_of_one_object(said: dict[str, Any]) -> None:
    assert parameters_of(QWEN3_CODER, ONE_BY_ONE) is not None
    assert parameters_of(QWEN3_CODER, {**ONE_BY_ONE, **said}) is None
    assert parameters_of(HERMES, ONE_BY_ONE) is None
    assert allows_arguments({"type": "object"}, '{"a": {}}') and not allows_arguments({"type": "object"}, "")
