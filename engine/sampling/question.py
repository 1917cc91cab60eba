"""What is said between a GrammarCompiler and the process that compiles for it."""

from __future__ import annotations

import msgspec


class Question(msgspec.Struct, frozen=True):
    """One of StructuredOutputs' kinds, as text; or a whole grammar of tools."""

    kind: str  # json, regex, choice, grammar, tools
    text: str
    any_whitespace: bool = True


class Answer(msgspec.Struct, frozen=True):
    """A grammar as Request.grammar has it, or why there is none."""

    grammar: str = ""
    error: str = ""
