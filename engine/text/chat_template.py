"""A model's chat template: conversations to prompts, in a sandbox, as Hugging Face transformers renders them.

The template comes from the model or the operator, never from a request. What a request brings is data: its strings
cannot make control tokens (see stand_ins.py).

Bounded are the length of the output, of strings and lists made by `+` and `*`, of every range and of all ranges of one
rendering together, and the size of powers. Time is not, nor what filters like `center` make: a template that its author
or the operator made to do harm can still do it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import FormatError, RequestError
from engine.text.stand_ins import ContentGuard, SpecialTexts, strings_in

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Templates build control tokens from roles, so no others are rendered."""

MAX_SOURCE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 64 << 20
MAX_RANGE_TOTAL = 1_000_000

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A rendered template. `Tokenizer.encode_rendered` makes token ids of it."""

    marked: str
    """The prompt, with stand-ins for those characters of content that could have taken part in a special token."""
    stand_ins: Mapping[int, str] = field(default_factory=dict)
    """Code point of each stand-in -> the character it stands for."""

    @property
    def text(self) -> str:
        """The prompt as people read it."""
        return self.marked.translate(self.stand_ins) if self.stand_ins else self.marked


class ChatTemplate:
    """A compiled chat template. Safe to render from several threads at once."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Sequence[str] = (),
    ) -> None:
        """`special_tokens` are the texts that content must not be able to make.

        Raises FormatError for a template that does not compile.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise FormatError(f"chat template: at most {MAX_SOURCE_CHARS} characters are read, it has {len(source)}")
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FormatError(f"chat template: {_said(error)}") from None
        self.source = source
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._tokens = {name: text for name, text in tokens.items() if text is not None}
        self._special = SpecialTexts(special_tokens)
        self._reads_parts = self._needs_parts()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> RenderedPrompt:
        """The prompt for a conversation.

        Content is a string, a list of {"type": "text", "text": ...} parts (joined with newlines where the template
        reads strings), or None, as beside tool calls. `continue_final_message` leaves the last message open and
        excludes `add_generation_prompt`. `variables` reach the template by name.

        Raises RequestError with the template's own message where it refuses the conversation, and where it fails on it.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other: a message is either begun or "
                "continued.",
                param="continue_final_message",
            )
        if taken := variables.keys() & _RESERVED:
            raise RequestError(f"A chat template's variable {min(taken)!r} cannot be replaced.", param=min(taken))
        conversation = [self._prepare(message, i) for i, message in enumerate(messages)]
        data = {"messages": conversation, "tools": tools, "documents": documents, **variables}
        guard = ContentGuard(self._special, (self.source, *strings_in(data)))
        data = {name: guard.guard(value) for name, value in data.items()}
        data["add_generation_prompt"] = add_generation_prompt
        if continue_final_message:
            marked = self._render_open(data, guard)
        else:
            marked = self._render(data, guard.stand_ins)
        return RenderedPrompt(marked, guard.stand_ins)

    def _prepare(self, message: Message, index: int) -> dict[str, Any]:
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(
                f"messages.{index}.role must be one of {', '.join(sorted(ROLES))}, got {str(role)[:64]!r}.",
                param=f"messages.{index}.role",
            )
        # Templates handle a missing key, and many print "None"; transformers leaves such keys out, too.
        prepared = {key: value for key, value in message.items() if value is not None}
        if (reasoning := message.get("reasoning_content")) is not None:
            prepared.setdefault("thinking", reasoning)  # the name some templates read
        content = message.get("content")
        if content is not None:
            where = f"messages.{index}.content"
            texts = [content] if isinstance(content, str) else self._texts(content, where)
            parts = [{"type": "text", "text": text} for text in texts]
            prepared["content"] = parts if self._reads_parts else "\n".join(texts)
        return prepared

    @staticmethod
    def _texts(content: Sequence[Any], where: str) -> list[str]:
        texts = []
        for i, part in enumerate(content):
            text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            if not isinstance(text, str):
                raise RequestError(f"{where}.{i} must be a text part: the model reads text only.", param=f"{where}.{i}")
            texts.append(text)
        return texts

    def _render_open(self, data: dict[str, Any], guard: ContentGuard) -> str:
        """Render up to the end of the last message's content, as transformers' continue_final_message does."""
        messages = data["messages"]
        content = messages[-1].get("content") if messages else None
        if not content:
            raise RequestError("The last message has no content that could be continued.", param="messages")
        mark = guard.fresh()
        tag = mark + " "  # the space tells whether the template strips content
        if isinstance(content, str):
            final: Any = content + tag
        else:
            final = [*content[:-1], {"type": "text", "text": content[-1]["text"] + tag}]
        opened = {**data, "messages": [*messages[:-1], {**messages[-1], "content": final}]}
        rendered = self._render(opened, guard.stand_ins)
        at = rendered.rfind(mark)
        if at < 0:
            raise RequestError(
                "The chat template leaves the last message out, so it cannot be continued.", param="messages"
            )
        return rendered[:at] if rendered.startswith(tag, at) else rendered[:at].rstrip()

    def _render(self, data: Mapping[str, Any], stand_ins: Mapping[int, str]) -> str:
        try:
            return self._run(data, stand_ins)
        except RequestError:
            # Templates that only join strings fail on messages without content, such as those that only call tools.
            messages = data["messages"]
            if all("content" in message for message in messages):
                raise
            filled = [{"content": "", **message} for message in messages]
            return self._run({**data, "messages": filled}, stand_ins)

    def _run(self, data: Mapping[str, Any], stand_ins: Mapping[int, str]) -> str:
        variables = {**self._tokens, "range": _bounded_range(), _STAND_INS_KEY: stand_ins, **data}
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise SecurityError(f"it writes more than {MAX_RENDERED_CHARS} characters")
        except _RefusedError as error:
            raise RequestError(str(error), param="messages") from None
        except Exception as error:  # a template can raise anything that Python's operators raise
            raise RequestError(
                f"The chat template cannot render these messages: {_said(error)}", param="messages"
            ) from None
        return "".join(pieces)

    def _needs_parts(self) -> bool:
        """Whether the template reads content as a list of parts only: tried with a text it has to show."""
        probe = "PROBE"

        def shows(content: Any) -> bool:
            data = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
            try:
                return probe in self._run({**data, "add_generation_prompt": True}, {})
            except RequestError:
                return False

        return not shows(probe) and shows([{"type": "text", "text": probe}])


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with bounds on what operators make."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            bounded = isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 1024
            bounded = bounded and abs(left) <= 1 << 32
        elif operator == "*":
            size = len(left) if _is_sized(left) else len(right) if _is_sized(right) else 0
            factor = right if _is_sized(left) else left
            bounded = size == 0 or (isinstance(factor, int) and size * factor <= MAX_RENDERED_CHARS)
            if size == 0 and isinstance(left, int) and isinstance(right, int):
                bounded = left.bit_length() + right.bit_length() <= 1 << 16
        else:
            bounded = not (_is_sized(left) and _is_sized(right)) or len(left) + len(right) <= MAX_RENDERED_CHARS
        if not bounded:
            raise SecurityError(f"the result of {operator!r} would be too large")
        return super().call_binop(context, operator, left, right)


def _is_sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple)


class _GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's text for training; renders what it holds."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Macro) -> str:
        return caller()


def _refuse(message: object) -> None:
    raise _RefusedError(str(message))


def _bounded_range() -> Callable[..., range]:
    """`range` for one rendering: jinja2 bounds each range, this all of them together."""
    left = MAX_RANGE_TOTAL

    def bounded(*args: int) -> range:
        nonlocal left
        made = jinja2.sandbox.safe_range(*args)
        left -= len(made)
        if left < 0:
            raise SecurityError(f"its ranges have more than {MAX_RANGE_TOTAL} items together")
        return made

    return bounded


@jinja2.pass_context
def _to_json(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """json.dumps, with transformers' defaults. Not escaped for HTML, unlike jinja2's own."""
    made = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _escape(made, context.get(_STAND_INS_KEY, {})) if ensure_ascii and not made.isascii() else made


def _escape(text: str, stand_ins: Mapping[int, str]) -> str:
    """ensure_ascii, but stand-ins stay whole and give way to their characters later.

    Outside ASCII JSON has nothing but the insides of strings, so escaping can follow dumping.
    """
    return "".join(
        character if character.isascii() or ord(character) in stand_ins else json.dumps(character)[1:-1]
        for character in text
    )


def _said(error: BaseException) -> str:
    """What an exception says, on one line and bounded."""
    line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    said = " ".join(str(error).split())
    return f"{said[:500] or type(error).__name__}{line}"


def _environment() -> _Environment:
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    made.filters["tojson"] = _to_json
    del made.globals["lipsum"]  # writes as much as it is asked to
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


_STAND_INS_KEY = "stand-ins"
"""No template can write this name."""
_RESERVED = frozenset({"add_generation_prompt", "bos_token", "eos_token", "range", "raise_exception", _STAND_INS_KEY})
_ENVIRONMENT = _environment()
