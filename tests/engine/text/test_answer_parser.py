"""Reading answers: the same events however the text was cut, and all of the text that is nobody's marker."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineError
from engine.text.answer_parser import AnswerParser, Arguments, CallBegin, Content, Event, Reasoning
from engine.text.tool_formats import FORMATS, HERMES, ToolFormat


def write(form: ToolFormat, *calls: tuple[str, str]) -> str:
    """Calls as a model of that format writes them."""
    separator = form.separator or ""
    written = separator.join(form.before + name + form.between + arguments + form.end for name, arguments in calls)
    return form.begin + form.opening + written + form.close


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


def read(form: ToolFormat | None, text: str, size: int = 1 << 30, **options: bool) -> list[Event]:
    parser = AnswerParser(form, **options)
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


def test_reasoning() -> None:
    call = write(HERMES, ("f", "{}"))
    events = [Reasoning("a <tool_call> b"), CallBegin(0, "f"), Arguments(0, "{}")]
    assert read(HERMES, f"<think>\na <tool_call> b\n</think>\n\n{call}", reasons=True) == events
    assert read(HERMES, f"\na <tool_call> b\n</think>\n\n{call}", reasons=True, in_reasoning=True) == events
    assert read(None, "<think></think>Hi", reasons=True) == [Content("Hi")]
    assert read(None, "<think>a </thin", reasons=True) == [Reasoning("a </thin")]
    assert read(None, " <thin", reasons=True) == [Content(" <thin")]
    assert read(None, "a <think>b</think>", reasons=True) == [Content("a <think>b</think>")]
    assert read(None, "<think>a</think>") == [Content("<think>a</think>")]


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
    for text in ("<tool_call>[", write(HERMES, ("f", "{}")) + "x"):
        with pytest.raises(EngineError, match="left the format"):
            read(HERMES, text)
