"""Chat templates in the styles of the Llama and Mistral families: what they use, and what they refuse."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from engine.errors import RequestError
from engine.text import ChatTemplate

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}
    {%- set instructions = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
    {%- set turns = messages -%}
    {%- set instructions = false -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant.') -}}
    {%- endif -%}
    {%- if turn['role'] == 'user' -%}
        {%- if loop.index0 == 0 and instructions != false -%}
            {%- set content = instructions + turn['content'] -%}
        {%- else -%}
            {%- set content = turn['content'] -%}
        {%- endif -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif turn['role'] == 'assistant' -%}
        {{- ' ' + turn['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set instructions = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- instructions + "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_message = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there is none.") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("One tool call at a time.") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", ' + '"parameters": ' }}
        {{- call.arguments | tojson + "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set instructions = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- set user_turns = turns | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in turns %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate user and assistant, tool calls and results aside.") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if tools is defined and tools is not none and message == user_turns[-1] %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, value in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + value | tojson + (", " if not loop.last else "") }}
                {%- endfor %}
                {{- "]" if loop.last else ", " }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and instructions is defined %}
            {{- "[INST] " + instructions + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception("Tool call ids must have 9 characters.") }}
            {%- endif %}
            {{- call.function | tojson + ", " + call.id }}{{ "]" + eos_token if loop.last else ", " }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + "}[/TOOL_RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool roles, after an optional system message.") }}
    {%- endif %}
{%- endfor %}
"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}


def said(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """A conversation of user and assistant in turn."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def render(source: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", special_tokens=("<s>", "</s>", "<|eot_id|>"))
    return template.render(messages, **arguments).text


def test_llama2() -> None:
    assert render(LLAMA2, said(" Hi ", " Hello! ", "Bye")) == "<s>[INST] Hi [/INST] Hello! </s><s>[INST] Bye [/INST]"
    assert render(LLAMA2, said("Hi", system="Be brief.")) == ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]")


def test_llama3() -> None:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    before = datetime.now().strftime("%d %b %Y")
    made = render(LLAMA3, said("Hi", "Hello", "Bye", system=" Be brief. "))
    dates = {before, datetime.now().strftime("%d %b %Y")}
    turns = f"{header('user')}Hi<|eot_id|>{header('assistant')}Hello<|eot_id|>{header('user')}Bye<|eot_id|>"
    assert made in {
        f"<s>{header('system')}Today Date: {date}\n\nBe brief.<|eot_id|>{turns}{header('assistant')}" for date in dates
    }
    assert "Today Date: 1 May" in render(LLAMA3, said("Hi"), date_string="1 May")


def test_llama3_with_tools() -> None:
    messages = [
        *said("What time is it?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "noon", "tool_call_id": "abcdefghi"},
    ]
    made = render(LLAMA3, messages, tools=[TOOL])
    assert "Environment: ipython\n" in made
    assert '        "name": "clock",\n' in made
    assert '{"name": "clock", "parameters": {"zone": "UTC"}}<|eot_id|>' in made
    assert "<|start_header_id|>ipython<|end_header_id|>\n\nnoon<|eot_id|>" in made
    assert "ipython" not in render(LLAMA3, said("Hi"))


def test_mistral() -> None:
    assert render(MISTRAL, said("Hi", " Hello ", "Bye")) == "<s>[INST] Hi[/INST] Hello</s>[INST] Bye[/INST]"
    assert render(MISTRAL, said("Hi", system="Be brief.")) == "<s>[INST] Be brief.\n\nHi[/INST]"


def test_mistral_with_tools() -> None:
    messages = [
        *said("What time is it?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "noon", "tool_call_id": "abcdefghi"},
    ]
    assert render(MISTRAL, messages, tools=[TOOL]) == (
        '<s>[AVAILABLE_TOOLS] ["name": "clock", "description": "The time", "parameters": '
        '{"type": "object", "properties": {}}][/AVAILABLE_TOOLS][INST] What time is it?[/INST]'
        '[TOOL_CALLS] [{"name": "clock", "arguments": {"zone": "UTC"}}, abcdefghi]</s>'
        '[TOOL_RESULTS] {"content": noon}[/TOOL_RESULTS]'
    )


def test_zephyr() -> None:
    assert render(ZEPHYR, said("Hi", system="Be brief.")) == (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    )
    assert render(ZEPHYR, said("Hi", "Hello"), add_generation_prompt=False).endswith("<|assistant|>\nHello</s>\n")


@pytest.mark.parametrize(
    ("source", "messages", "arguments", "message"),
    [
        (LLAMA2, said("a", "b")[1:], {}, "roles must alternate user/assistant"),
        (LLAMA2, [*said("a"), *said("b")], {}, "roles must alternate user/assistant"),
        (LLAMA2, [*said("a", "b"), *said(system="late")], {}, "roles must alternate user/assistant"),
        (LLAMA3, said(system="Be brief."), {"tools": [TOOL]}, "Cannot put tools in the first user message"),
        (LLAMA3, [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}], {}, "One tool call at a time"),
        (MISTRAL, [*said("a"), *said("b")], {}, "Roles must alternate user and assistant"),
        (MISTRAL, [*said("a", "b"), *said(system="late")], {}, "Roles must alternate user and assistant"),
        (
            MISTRAL,
            [*said("a"), {"role": "assistant", "tool_calls": [{**CALL, "id": "x"}]}],
            {},
            "Tool call ids must have 9 characters",
        ),
    ],
)
def test_what_a_template_refuses_is_the_request_s_fault(
    source: str, messages: list[dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=f"^[^:]*{message}") as caught:
        render(source, messages, **arguments)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", [LLAMA2, LLAMA3, MISTRAL, ZEPHYR])
def test_text_parts_and_control_tokens_in_content(source: str) -> None:
    parts = [{"type": "text", "text": "one</s>"}, {"type": "text", "text": "<|eot_id|>two"}]
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", special_tokens=("<s>", "</s>", "<|eot_id|>"))
    plain = template.render(said("x"))
    rendered = template.render([{"role": "user", "content": parts}])
    assert "one</s>\n<|eot_id|>two" in rendered.text
    assert rendered.marked.count("</s>") == plain.text.count("</s>")
    assert rendered.marked.count("<|eot_id|>") == plain.text.count("<|eot_id|>")


@pytest.mark.parametrize("source", [LLAMA3, MISTRAL])
def test_without_a_bos_token_nothing_is_written_for_it(source: str) -> None:
    assert "None" not in ChatTemplate(source, eos_token="</s>").render(said("Hi")).text
