"""How large a grammar may be, and how much work it may cause.

The library counts its work in units of its own ("fuel", items); its limits make an answer that exceeds one fail alone.
What they do not bound, the time and the stack of a compilation, `checker` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLParserLimits

MAX_GRAMMAR_BYTES = 64 << 10
"""Longest schema, expression, list of choices or grammar, as UTF-8."""

MAX_TOOLS_BYTES = 128 << 10
"""The same of a grammar with the schemas of all tools."""

MAX_CHOICES = 4096

WHITESPACE = r"[ \t\r\n]{1,16}"
"""White space between the tokens of JSON. A model that is unsure likes to go on with it, and it would be allowed to for
ever; sixteen characters are a new line and its indentation."""

CPU_SECONDS = 1.0
"""Time of a processor after which a compilation counts as hopeless. Usual schemas take a few milliseconds."""

ADDRESS_SPACE = 1 << 30
"""Bytes of memory that compiling may take."""

CHECK_STACK = 1 << 20
COMPILE_STACK = 16 << 20
"""Bytes of stack: what compiles on the first one has room enough on the second, with the tokens of any model."""

MASK_SECONDS = 1.0
MASK_SECONDS_PER_TOKEN = 0.01
"""Time of a processor that checks and masks of one answer may take, beside the library's limits on each."""


def parser_limits() -> LLParserLimits:
    """The library's limits, the same wherever a grammar is compiled.

    A fraction of its defaults, for it shares its processors with everybody's tokens: at most a few milliseconds of
    lexer work in a step.
    """
    from llguidance import LLParserLimits  # slow to import, and most engines never need it

    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=5_000,
        max_lexer_states=10_000,
        max_grammar_size=50_000,
        precompute_large_lexemes=False,  # would walk the vocabulary when compiling, outside of any limit
        verbose_errors=False,
    )


def with_options(schema: Mapping[str, Any], *, any_whitespace: bool = True) -> dict[str, Any]:
    """A JSON schema with the library's options as we want them, in place of any that it carries: callers set none."""
    options: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "whitespace_flexible": any_whitespace}
    if any_whitespace:
        options["whitespace_pattern"] = WHITESPACE
    return {**schema, "x-guidance": options}
