"""Reading answers: the same events however the text was cut, and all of the text that is nobody's marker."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.text.answer_parser import AnswerParser, Arguments, CallBegin, Content, Event, Reasoning
from engine.text.tool_formats import FORMATS, HERMES, QWEN3_CODER, ToolFormat

SCHEMAS: dict[str, dict[str, Any]] = {
    "f": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array"}}},
    "g": {"type": "object", "properties": {"x": {"type": "integer"}}},
    "g-2": {"type": "object", "additionalProperties": False},
}


def write(form: ToolFormat, *calls: tuple[str, str]) -> str:
    """Calls as a model of that format writes them."""
    separator = form.separator or ""
    written = separator.join(
        form.before + name + form.between + write_arguments(form, arguments) + form.end for name, arguments in calls
    )
    return form.begin + form.opening + written + form.close


def write_arguments(form: ToolFormat, arguments: str) -> str:
    """JSON as a model of that format writes it, one by one in its order where the format is such."""
    if form.parameter is None:
        return arguments
    before, between, after = form.parameter
    values = {
        name: value if isinstance(value, str) else json.dumps(value) for name, value in json.loads(arguments).items()
    }
    return "".join(before + name + between + value + after for name, value in values.items())


def joined(events: list[Event]) -> list[Event]:
    """Events with neighbours of a kind made one."""
    made: list[Event] = []
    for event in events:
        last = made[-1] if made else None
        if isinstance(event, Content | Reasoning | Arguments) and type(event) is type(last):
            assert isinstance(last, Content | Reasoning | Arguments)
            if getattr(event, "index", 0) == getattr(last, "index", 0):
                made[-1] = dataclasses.replace(last, text=last.text + event.text)
                continue
        made.append(event)
    return made


def read(
    form: ToolFormat | None, text: str, size: int = 1 << 30, schemas: Any = SCHEMAS, **options: bool
) -> list[Event]:
    parser = AnswerParser(form, schemas, **options)
    events = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])]
    return joined(events + parser.finish())


TRICKY = '{"a": "} </tool_call> \\" ] [TOOL_CALLS]", "b": [{"c": {}}]}'


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_calls(form: ToolFormat) -> None:
    one = [CallBegin(0, "f"), Arguments(0, TRICKY)]
    assert read(form, write(form, ("f", TRICKY))) == one
    if form.separator is not None:
        two = write(form, ("f", TRICKY), ("g-2", "{}"))
        assert read(form, two) == [*one, CallBegin(1, "g-2"), Arguments(1, "{}")]
    if not form.only_first:
        assert read(form, "Let me see.\n\n" + write(form, ("f", TRICKY))) == [Content("Let me see."), *one]
    for text in ("", "Hi", " Hi \n", form.begin[:-1], f"a {form.begin[:3]} b"):
        assert read(form, text) == ([Content(text)] if text else [])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_reasoning_before_calls(form: ToolFormat) -> None:
    call, thought = write(form, ("f", "{}")), f"a {form.begin} b"
    events = [Reasoning(thought), CallBegin(0, "f"), Arguments(0, "{}")]
    assert read(form, f"<think>\n{thought}\n</think>\n\n{call}", reasons=True) == events
    assert read(form, f"\n{thought}\n</think>\n\n{call}", reasons=True, in_reasoning=True) == events


def test_reasoning() -> None:
    assert read(None, "<think></think>Hi", reasons=True) == [Content("Hi")]
    assert read(None, "<think>a </thin", reasons=True) == [Reasoning("a </thin")]
    assert read(None, " <thin", reasons=True) == [Content(" <thin")]
    assert read(None, "a <think>b</think>", reasons=True) == [Content("a <think>b</think>")]
    assert read(None, "<think>a</think>") == [Content("<think>a</think>")]


def test_arguments_one_by_one() -> None:
    def call(body: str) -> str:
        return f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"

    def arguments(body: str, schema: Any, size: int = 1 << 30) -> str:
        begun, *others = read(QWEN3_CODER, call(body), size, {"f": schema})
        assert begun == CallBegin(0, "f") and all(isinstance(event, Arguments) for event in others)
        return "".join(event.text for event in others if isinstance(event, Arguments))

    properties = {"s": {"type": "string"}, "n": {"type": "integer"}, "w": {"type": "string", "maxLength": 9}, "v": {}}
    schema = {"type": "object", "properties": properties}
    for body, expected in (
        ("", "{}"),
        ("<parameter=s>\n5\n</parameter>\n", '{"s": "5"}'),
        ("<parameter=s>\n\n</parameter>\n", '{"s": ""}'),
        ("<parameter=s>\n \n\n</parameter>\n", '{"s": " \\n"}'),
        ('<parameter=s>\n</parameter "\\\té\n</parameter>\n', r'{"s": "</parameter \"\\\té"}'),
        ("<parameter=s>\nTrue\n</parameter>\n<parameter=n>\n5\n</parameter>\n", '{"s": "True", "n": 5}'),
        ('<parameter=w>\n"a"\n</parameter>\n<parameter=v>\n[{},\n1]\n</parameter>\n', '{"w": "a", "v": [{},\n1]}'),
    ):
        for size in (1, 2, 7, 1 << 30):
            assert arguments(body, schema, size) == expected
    assert arguments('{"s": "</function>"}', {"type": "object"}) == '{"s": "</function>"}', "any object at all"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_the_end_may_come_anywhere(form: ToolFormat) -> None:
    whole = write(form, ("f", TRICKY))
    for size in range(len(whole)):
        events = read(form, whole[:size])
        arguments = "".join(event.text for event in events if isinstance(event, Arguments))
        assert TRICKY.startswith(arguments)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_how_the_text_is_cut_does_not_matter(form: ToolFormat, data: st.DataObject) -> None:
    calls = write(form, *[("f", TRICKY), ("g", '{"x":1}')][: 2 if form.separator else 1])
    pieces = ["<think>", "</think>", " \n", "x", "<", form.begin[:3], "é"]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=8)))
    if data.draw(st.booleans()):
        text = calls if form.only_first else text + calls
    text = text[: data.draw(st.integers(0, len(text)))]
    options = {"reasons": data.draw(st.booleans()), "in_reasoning": data.draw(st.booleans())}
    assert read(form, text, data.draw(st.integers(1, 9)), **options) == read(form, text, **options)


def test_what_no_grammar_allows_is_an_error_of_ours() -> None:
    for form in (HERMES, QWEN3_CODER):
        for text in ("<tool_call>[", write(form, ("f", "{}")) + "x"):
            with pytest.raises(EngineError, match="left the format"):
                read(form, text)
    with pytest.raises(EngineError, match="left the format"):
        read(QWEN3_CODER, "<tool_call>\n<function=f>\n<parameters>")
