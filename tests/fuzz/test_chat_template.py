"""Chat templates, which are programs from a stranger, and conversations, which are data from another one.

Templates are bounded by counting (see `engine.text.sandbox`); what is tested here is that the count is right: that no
template finds an operation that costs more than it pays for.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from engine.errors import FormatError, RequestError
from engine.text import ChatTemplate, sandbox
from engine.text.sandbox.costs import FILTERS
from tests.fuzz.harness import fuzz, limited, ours, peak_bytes
from tests.fuzz.templates import conversations, data, expressions, templates
from tests.golden.texts import TOOL_TEMPLATE
from tests.tiny_gguf import CHAT_TEMPLATE, SPECIAL_TOKENS

MESSAGES = [{"role": "system", "content": "Be <kind>."}, {"role": "user", "content": "Héllo\nworld", "name": "x"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SLACK = 5
"""Times the nominal cost: a busy machine, tracing, and estimates that are no better than that."""
UNIT_SECONDS = 20e-9
MADE_BYTES = 4 * sandbox.MAX_MADE
"""What a rendering may hold: four bytes for each character that it may make."""


DEEP = [
    # Each reads far more than its own text: by a name instead of a place, along a path, in a literal.
    "'ab' is in(seq=h)",
    "['ab'] | select('in', seq=h) | list",
    "(a * 9) | trim('c' * 99999 ~ ' ab')",
    "([{}] * 999) | map(attribute=p, default={}) | list",
    "([{'a': {}}] * 999) | groupby(p, default={}) | list",
    "a | max",
    "a | unique | list | length",
    "(ns.x ~ 'b') in '" + "a" * 50_000 + "'",
]


def render(source: str) -> None:
    with ours():
        prompt = ChatTemplate(source, special_tokens=SPECIAL_TOKENS).render(MESSAGES, tools=TOOLS)
        assert len(prompt.marked) <= sandbox.MAX_MADE * 2


@fuzz(50, source=templates)
def test_random_templates_end_soon(folder: Path, source: str) -> None:
    before = time.process_time()
    render(source)
    assert time.process_time() - before < SLACK * UNIT_SECONDS * sandbox.MAX_WORK


@fuzz(24, source=templates)
def test_random_templates_take_bounded_memory(folder: Path, source: str) -> None:
    assert peak_bytes(lambda: render(source)) < MADE_BYTES + (32 << 20)


@fuzz(40, source=expressions)
def test_no_expression_costs_more_than_it_pays_for(folder: Path, source: str) -> None:
    repeat(source)


@pytest.mark.parametrize("source", DEEP)
def test_what_takes_long_costs_much(source: str) -> None:
    repeat(source)


def repeat(source: str) -> None:
    """The same expression until the budget is used up: where an operation is too cheap, this takes far too long."""
    prefix = "{% set ns = namespace(x='ab' * 5000) %}{% set a = 'a b' * 9999 %}{% set b = range(999) | list %}"
    prefix += "{% set h = 'a' * 1000000 %}{% set p = 'a.' * 9999 ~ 'a' %}"
    budget = sandbox.MAX_WORK // 10
    before = time.process_time()
    with ours():
        repeated = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = EXPR %}{% endfor %}{% endfor %}"
        template = ChatTemplate(prefix + repeated.replace("EXPR", source))
        template._run({"messages": MESSAGES, "tools": TOOLS}, {}, budget)
    assert time.process_time() - before < SLACK * UNIT_SECONDS * (budget + 2 * sandbox.MAX_WORK // 20)


@fuzz(100, source=st.text("{%}#-+ \n'<|x.[]()0in=for if end set raise_exception messages", max_size=80))
def test_noise(folder: Path, source: str) -> None:
    render(source)


UNITS = [
    "{{a}}",
    "{{ a + b }}",
    "{% if a %}",
    "{% endif %}",
    "{%",
    "{{ [",
    "((",
    "{#",
    "'",
    "1_",
    "\\",
    "{% elif a %}",
    "-",
    ".b",
]
UNITS += [
    "{% for a in b %}",
    "{% raw %}",
    "{% macro m() %}",
    "{% set a %}",
    "|e",
    "[",
    "a if b else ",
    "~a",
    " not",
    "\n{%-",
    "{{ 9",
]


@fuzz(25, units=st.lists(st.sampled_from(UNITS), min_size=1, max_size=2), opened=st.booleans())
def test_sources_that_repeat_themselves(folder: Path, units: list[str], opened: bool) -> None:
    """What a lexer, a parser or a compiler answers to one thing thousands of times."""
    whole = ("{{ " if opened else "") + "".join(units) * 20_000
    render(whole[: 40_000 + len(units)])


@cache
def benign(name: str) -> ChatTemplate:
    parts = "{% for m in messages %}{% for p in m.content %}<|im_start|>{{ p.text }}{% endfor %}{% endfor %}"
    everything = "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ documents }}"
    sources = {"chatml": CHAT_TEMPLATE, "tools": TOOL_TEMPLATE, "parts": parts, "everything": everything}
    return ChatTemplate(sources[name], special_tokens=SPECIAL_TOKENS)


@fuzz(
    200,
    name=st.sampled_from(["chatml", "tools", "parts", "everything"]),
    messages=conversations,
    extra=st.fixed_dictionaries({}, optional={"tools": data, "documents": data, "enable_thinking": data}),
    begin=st.booleans(),
    go_on=st.booleans(),
)
def test_hostile_conversations(
    folder: Path, name: str, messages: list[dict[str, Any]], extra: dict[str, Any], begin: bool, go_on: bool
) -> None:
    try:
        benign(name).render(messages, add_generation_prompt=begin, continue_final_message=go_on, **extra)
    except RequestError as error:
        assert 0 < len(str(error)) < 3000


def test_what_templates_reach_is_a_list() -> None:
    """A new version of jinja2 may bring filters and tests: nothing is reachable before it was looked at."""
    environment = sandbox.Sandbox(functions={}, filters={}, extensions=[])
    assert {name for name in environment.filters if not name.startswith(" ")} == FILTERS
    assert set(environment.globals) == {"range", "dict", "cycler", "joiner", "namespace"}


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '' | attr('__class__') | attr('__mro__') }}",
    "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0[__class__]}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))('') }}",
    "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "{% set f = '{0.__class__}'.format %}{{ [''] | map('attr', '__class__') | list }}{{ f('') }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ range.__globals__ }}",
    "{{ caller.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m._environment }}",
    "{% for i in [1] %}{{ loop._recurse }}{{ loop._iterable }}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "{{ (messages | select).gi_code }}",
    "{{ messages.copy.__self__.__class__ }}",
    "{{ dict.__base__ }}{{ dict.fromkeys.__self__ }}",
    "{{ ().__class__ }}{{ (1).__class__ }}{{ {}.__class__ }}{{ none.__class__ }}",
    "{{ missing.__class__ }}{{ missing._fail_with_undefined_error }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_s_insides_is_reached(source: str) -> None:
    try:
        shown = ChatTemplate(source).render(MESSAGES).text
    except (FormatError, RequestError):
        return
    for word in ("class '", "type '", "module", "frame", "code object", "Context", "Environment", "os."):
        assert word not in shown, shown


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% autoescape true %}{{ 1 }}{% endautoescape %}", "autoescape is not supported: a prompt is no HTML, line 1"),
        ("\n{% include 'other' %}", "include is not supported: a chat template stands alone, line 2"),
        ("{% extends 'other' %}", "extends is not supported: a chat template stands alone, line 1"),
        ("{{a}}" * 20_000, "at most 20000 pieces of syntax are compiled, it has 20001, line 1"),
    ],
)
def test_what_is_not_compiled(source: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        ChatTemplate(source)
    assert str(caught.value) == f"chat template: {said}"


HUGE = [
    "{{ 'a' | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ 'a' * 1000000000 }}",
    "{{ ['a'] * 1000000000 }}",
    "{{ 9 ** 999999999 }}",
    "{{ range(1000000000) | list }}",
    "{{ 'ab' | indent(1000000000, true) }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=()) %}{% for i in range(99999) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [{}, {}, {}] %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, 'a b ' * 9999] %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% macro m() %}" + "{{ x }}" * 99 + "{% endmacro %}{{ m() }}",
    "{{a}}" * 26_000,
    "{{ ('a' * 100000) | replace(old='a', new='x' * 100000) }}",
    "{{ ('a' * 100000) | replace(old='', new='x' * 100000) }}",
    "{{ ['a' * 100000] | replace('a', 'x' * 100000) }}",
    "{{ ('a' * 100000) | replace('a', ['x' * 100000]) }}",
]


def test_hostile_sizes_in_a_process_of_bounded_memory() -> None:
    """Also what Python does not account for; a MemoryError would say so in the message."""
    script = """
        from engine.errors import FormatError, RequestError
        from engine.text import ChatTemplate
        limit()
        for source in given:
            try:
                ChatTemplate(source).render([{"role": "user", "content": "Hi"}])
            except (FormatError, RequestError) as error:
                print(error)
    """
    said = limited(script, HUGE, megabytes=MADE_BYTES * 3 >> 20)
    assert len(said) == len(HUGE)
    assert [line for line in said if "Memory" in line] == []
