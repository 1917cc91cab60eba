"""Which format a template's model writes, and what becomes of tools where a template knows none."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from llguidance import LLMatcher

from engine.sampling.limits import parser_limits
from engine.sampling.masks import make_tokenizer
from engine.sampling.tool_grammar import Calls, tool_grammar
from engine.text import ChatTemplate, ModelText, Tokenizer
from engine.text.answer_parser import AnswerParser, Arguments, CallBegin
from engine.text.tool_formats import FORMATS, ToolFormat, find_format, generic_history, has_reasoning, shorten_ids
from engine.weights import PackedModel
from tests.engine.text.test_answer_parser import read, write
from tests.engine.text.test_model_templates import LLAMA2, LLAMA3, MISTRAL, TOOL, ZEPHYR, render, said
from tests.engine.text.tool_templates import (
    DISTILLED,
    GEMMA,
    GLM,
    MISTRAL_V11,
    MISTRAL_V13,
    PHI4_MINI,
    QWEN,
    QWEN_CODER,
)

CALLS: list[dict[str, Any]] = [
    {"id": "call_abcdefghi1", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}},
    {"id": "call_abcdefghi2", "type": "function", "function": {"name": "clock", "arguments": {"zone": "é"}}},
]


def history(num_calls: int) -> list[dict[str, Any]]:
    calls = CALLS[:num_calls]
    results = [{"role": "tool", "content": f"noon {i}", "tool_call_id": call["id"]} for i, call in enumerate(calls)]
    return [
        *said("What time is it?"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        *results,
    ]


@pytest.mark.parametrize(
    ("source", "expected", "reasons"),
    [
        (QWEN, "hermes", True),
        (LLAMA3, "llama3_json", False),
        (MISTRAL, "mistral", False),
        (MISTRAL_V11, "mistral_v11", False),
        (MISTRAL_V13, "mistral_v11", False),
        (PHI4_MINI, "phi4_mini", False),
        (PHI4_MINI.replace("<|tool|>", "[TOOLS]"), "generic", False),
        (QWEN_CODER, "qwen3_coder", False),
        (GLM, "generic", False),
        (LLAMA2, "generic", False),
        (ZEPHYR, "generic", False),
        (GEMMA, "generic", False),
        (DISTILLED, "generic", True),
    ],
)
def test_formats_are_found(source: str, expected: str, reasons: bool) -> None:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert (find_format(template).name, has_reasoning(template)) == (expected, reasons)


@pytest.mark.parametrize(
    ("source", "num_calls"), [(QWEN, 2), (LLAMA3, 1), (MISTRAL, 1), (MISTRAL_V11, 2), (MISTRAL_V13, 2), (QWEN_CODER, 2)]
)
def test_what_a_template_renders_is_what_its_format_reads(source: str, num_calls: int) -> None:
    """A call of the history as the template shows it to the model is one that the parser finds."""
    form = find_format(ChatTemplate(source))
    messages = history(num_calls)
    if form.id_length is not None:
        messages = shorten_ids(messages, form.id_length)
    made = render(source, messages, tools=[TOOL])
    shown = made[made.rindex("What time is it?") :]
    assert all(f"noon {i}" in shown for i in range(num_calls))
    if form.id_length is not None:  # templates put ids, and a space, where models write none
        for message in messages[2:]:
            for around in ("[CALL_ID]{}", ", {}"):
                shown = shown.replace(around.format(message["tool_call_id"]), "")
        shown = shown.replace("[TOOL_CALLS] ", "[TOOL_CALLS]")
    shown = shown[shown.index(form.begin) :]
    ends = ("<|im_end|>", "<|eot_id|>", "</s>")
    shown = shown[: min(at for end in ends if (at := shown.find(end)) >= 0)]
    events = read(form, shown, schemas={"clock": {"type": "object", "properties": {"zone": {"type": "string"}}}})
    assert [event.name for event in events if isinstance(event, CallBegin)] == ["clock"] * num_calls
    arguments = [json.loads(event.text) for event in events if isinstance(event, Arguments)]
    assert arguments == [call["function"]["arguments"] for call in CALLS[:num_calls]]


def test_tools_in_plain_messages() -> None:
    plain = generic_history(history(2), [TOOL], shows_system=True)
    assert [message["role"] for message in plain] == ["system", "user", "assistant", "user"]
    assert '{"name": "clock", "description": "The time"' in plain[0]["content"]
    parser = AnswerParser(FORMATS["generic"])
    events = parser.feed(plain[2]["content"]) + parser.finish()
    assert [event.index for event in events if isinstance(event, CallBegin)] == [0, 1]
    assert plain[3]["content"] == (
        "<tool_response>\nnoon 0\n</tool_response>\n<tool_response>\nnoon 1\n</tool_response>"
    )
    ruled = generic_history([{"role": "system", "content": "Be brief."}, *history(1)], [TOOL], shows_system=True)
    assert ruled[0]["content"].startswith("Be brief.\n\nYou can call functions.") and len(ruled) == 4
    assert generic_history(said("Hi"), None, shows_system=True) == said("Hi")


def test_tools_that_come_with_the_system_message(default_model: PackedModel) -> None:
    text = ModelText(Tokenizer.from_info(default_model.info), ChatTemplate(PHI4_MINI))

    def shown(messages: list[dict[str, Any]]) -> str:
        return text.decode(text.encode_chat(messages, tools=[TOOL]), skip_special=False)

    listed = f"<|tool|>{json.dumps([TOOL['function']])}<|/tool|><|end|><|user|>"
    assert shown(said("Hi")) == f"<|system|>You are a helpful assistant with some tools.{listed}Hi<|end|><|assistant|>"
    assert shown(said("Hi", system="Be brief.")) == f"<|system|>Be brief.{listed}Hi<|end|><|assistant|>"
    made = shown(history(2))
    call = '{"name": "clock", "arguments": {"zone": "%s"}}'
    written = f"<|tool_call|>[{call % 'UTC'}, {call % 'é'}]<|/tool_call|>"
    assert f"<|assistant|>{written}<|end|><|user|><tool_response>\nnoon 0" in made
    events = read(FORMATS["phi4_mini"], written)
    assert [event.name for event in events if isinstance(event, CallBegin)] == ["clock", "clock"]
    untold = text.decode(text.encode_chat(history(1)), skip_special=False)
    assert "<|tool|>" not in untold and "noon 0" in untold


@pytest.mark.parametrize("source", [GEMMA, LLAMA2, ZEPHYR])
def test_templates_that_insist_on_turns_show_it_all(source: str) -> None:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert template.shows_system() is (source != GEMMA)
    plain = generic_history(history(2), [TOOL], shows_system=template.shows_system())
    made = template.render(plain).text
    for text in ('"name": "clock"', "What time is it?", '{"zone": "é"}', "noon 0", "noon 1"):
        assert text in made


def test_ids_of_the_length_that_a_template_wants() -> None:
    made = shorten_ids(history(2), 9)
    assert [call["id"] for call in made[1]["tool_calls"]] == ["bcdefghi1", "bcdefghi2"]
    assert [message["tool_call_id"] for message in made[2:]] == ["bcdefghi1", "bcdefghi2"]
    assert render(MISTRAL, made, tools=[TOOL]).count("noon") == 2
    assert shorten_ids([{"role": "tool", "tool_call_id": "x", "content": ""}], 9)[0]["tool_call_id"] == "00000000x"


@pytest.mark.parametrize(
    "form",
    [
        dataclasses.replace(FORMATS["mistral"], begin="<repo_name>", separator="<file_sep>"),
        dataclasses.replace(FORMATS["mistral_v11"], begin="<repo_name>", between="<file_sep>", separator="<repo_name>"),
    ],
    ids=lambda form: form.name,
)
def test_markers_that_are_special_tokens(default_model: PackedModel, form: ToolFormat) -> None:
    """They are made by their own tokens alone, in the order that the format says, and shown to the parser."""
    text = ModelText(Tokenizer.from_info(default_model.info), ChatTemplate(QWEN), tool_format=form)
    assert set(text.marker_ids) == {"<repo_name>", "<file_sep>"}
    schemas = {"f": {"type": "object", "properties": {}, "additionalProperties": False}}
    tokenizer = make_tokenizer(text.tokenizer, text.tokenizer.vocab_size)

    def allows(token_ids: list[int], calls: Calls) -> bool:
        grammar = tool_grammar(form, schemas, calls=calls, special=text.marker_ids)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
        assert not matcher.is_error(), matcher.get_error()
        return bool(matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting())

    def plain(written: str) -> list[int]:
        return text.encode(written, add_special_tokens=False)

    def marked(written: str) -> list[int]:
        pieces = re.split("(<repo_name>|<file_sep>)", written)
        ids = [[text.marker_ids[piece]] if piece in text.marker_ids else plain(piece) for piece in pieces]
        return [token_id for each in ids for token_id in each]

    written = write(form, ("f", "{}"), ("f", "{}"))
    two = marked(written)
    assert allows(two, "required") and allows([*plain("Well."), *two], "auto") and not allows(two, "none")
    assert not allows(plain(written), "auto"), "its text is not the token"
    assert not allows([*two[:1], *plain(written.removeprefix("<repo_name>"))], "auto"), "nor are the others' texts"
    for show, calls in ((True, ["f", "f"]), (False, [])):
        stream, parser = text.stream(show_markers=show), AnswerParser(form)
        events = parser.feed("".join(map(stream.push, two))) + parser.finish()
        assert [event.name for event in events if isinstance(event, CallBegin)] == calls
