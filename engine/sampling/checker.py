"""Compiles grammars in a process of its own: `python -m engine.sampling.checker`, a line of JSON in, one out.

A grammar is a small program that strangers send. The library bounds most of what it does with one, but not how deep it
recurses and not how long it takes, and a stack that overflows takes its process along. So each grammar is compiled
here first, on a small stack, under limits of time and memory that the kernel enforces by ending this process; what
gets through can be compiled by an engine. Deliberately without numpy, tokenizers or anything else that starts slowly.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from engine.sampling.limits import ADDRESS_SPACE, CHECK_STACK, CPU_SECONDS, parser_limits, with_options
from engine.sampling.question import Answer, Question

EOS = 256


class _Bytes:
    """The vocabulary of single bytes, in which every text can be written. What the library asks of a tokenizer."""

    is_tokenizer_wrapper = True
    eos_token_id = EOS
    bos_token_id = None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]
    special_token_ids = [EOS]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def translate(question: Question) -> str:
    """The grammar in the library's own form, not compiled. Raises ValueError for text that is no grammar at all."""
    match question.kind:
        case "json":
            schema = msgspec.json.decode(question.text)
            if not isinstance(schema, dict):
                raise ValueError("a schema must be a JSON object")
            held = with_options(schema, any_whitespace=question.any_whitespace)
            return _json({"grammars": [{"json_schema": held}]})
        case "regex":
            return LLMatcher.grammar_from_regex(question.text)
        case "choice":
            # JSON's escapes are Lark's, as long as no character is cut into surrogates.
            texts = (_json(choice) for choice in msgspec.json.decode(question.text, type=list[str]))
            return _json({"grammars": [{"lark_grammar": "start: " + " | ".join(texts)}]})
        case "grammar":
            lark: str = any_to_lark(question.text)
            return _json({"grammars": [{"lark_grammar": lark}]})
        case "tools":
            return question.text  # made by tool_grammar
    raise ValueError(f"unknown kind {question.kind!r}")


def check(question: Question, tokenizer: LLTokenizer) -> Answer:
    """Translate and compile, as far as the first mask."""
    try:
        grammar = translate(question)
    except (ValueError, RecursionError, AssertionError, IndexError) as error:  # the last two: any_to_lark's
        return Answer(error=str(error) or type(error).__name__)
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return Answer(error=matcher.get_error())
    if any("tokenizer" in warning for warning in matcher.get_grammar_warnings()):
        return Answer(error="tokens cannot be named, only their text")
    return Answer(grammar="" if question.kind == "tools" else grammar)  # whoever asks has it


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.nice(5)  # behind everybody's tokens
    tokenizer = LLTokenizer(_Bytes(), eos_token=[EOS])  # type: ignore[arg-type]
    threading.stack_size(CHECK_STACK)
    answers: list[Answer] = []
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line, type=Question)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # nothing handles it: the process ends
        thread = threading.Thread(target=lambda: answers.append(check(question, tokenizer)))  # noqa: B023 - joined here
        thread.start()
        thread.join()
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer = answers.pop() if answers else Answer(error="the grammar could not be compiled")
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
