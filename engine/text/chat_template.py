"""A model's chat template: conversations to prompts, in a sandbox, as Hugging Face transformers renders them.

The template comes from the model or the operator, never from a request. What a request brings is data: its strings
cannot make control tokens (see stand_ins.py).

Neither can the template do harm: what it may call, how long it runs and how much memory it takes are bounded (see
sandbox/).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro

from engine.errors import FormatError, RequestError
from engine.text.sandbox import BUDGET, MAX_WORK, Budget, Sandbox
from engine.text.stand_ins import ContentGuard, SpecialTexts, strings_in

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
"""Templates build control tokens from roles, so no others are rendered."""

MAX_SOURCE_CHARS = 1 << 17
"""The longest in the field have 40,000."""
MAX_SPECIAL_SQUARES = 1 << 26
"""Sum of the squared lengths of special tokens: 16,000 of 64 characters, one of 8,000."""
MAX_REFUSAL_CHARS = 2000
"""Of what a template says when it refuses a conversation; it goes into an error's message."""

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

        Raises FormatError for a template that does not compile, and for special tokens longer than any real ones.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise FormatError(f"chat template: at most {MAX_SOURCE_CHARS} characters are read, it has {len(source)}")
        try:
            self._template = _ENVIRONMENT.from_string(source)
            self._names, self._variables = _names(source)
        except (jinja2.TemplateError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise FormatError(f"chat template: {_said(error)}") from None
        if sum(len(text) ** 2 for text in special_tokens) > MAX_SPECIAL_SQUARES:  # every part of each is remembered
            longest = max(map(len, special_tokens))
            raise FormatError(f"tokenizer: special tokens are too long together, the longest has {longest} characters")
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
        excludes `add_generation_prompt`. `variables` reach the template by name, but for `RESERVED` ones.

        Raises RequestError with the template's own message where it refuses the conversation, and where it fails on it.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other: a message is either begun or "
                "continued.",
                param="continue_final_message",
            )
        need_free(variables)
        conversation = [self._prepare(message, i) for i, message in enumerate(messages)]
        data = {"messages": conversation, "tools": tools, "documents": documents, **variables}
        try:
            guard = ContentGuard(self._special, (self.source, *strings_in(data)))
            data = {name: guard.guard(value) for name, value in data.items()}
        except RecursionError:
            raise RequestError(
                "The messages, or what is beside them, are nested too deeply.", param="messages"
            ) from None
        data["add_generation_prompt"] = add_generation_prompt
        if continue_final_message:
            marked = self._render_open(data, guard)
        else:
            marked = self._render(data, guard.stand_ins)
        return RenderedPrompt(marked, guard.stand_ins)

    def reads(self, name: str) -> bool:
        """Whether the template uses a variable of that name."""
        return name in self._variables

    @property
    def knows_tools(self) -> bool:
        """Whether calls of tools in a conversation, and their results, reach the prompt."""
        return {"tool_calls", "tool"} <= self._names

    def shows_system(self) -> bool:
        """Whether a conversation may begin with a system message, and the prompt then holds it."""
        probe = "PROBE"
        messages = [{"role": "system", "content": probe}, {"role": "user", "content": "."}]
        try:
            return probe in self.render(messages).marked
        except RequestError:
            return False

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
        self._need_known(message, index)
        content = message.get("content")
        if content is not None:
            where = f"messages.{index}.content"
            texts = [content] if isinstance(content, str) else self._texts(content, where)
            parts = [{"type": "text", "text": text} for text in texts]
            prepared["content"] = parts if self._reads_parts else "\n".join(texts)
        return prepared

    def _need_known(self, message: Message, index: int) -> None:
        """Raise RequestError for a call of a tool, or a tool's answer, that the template would leave out or garble."""
        for is_there, name, what in (
            (bool(message.get("tool_calls")), "tool_calls", "calls of tools"),
            (message.get("role") == "tool", "tool", "tools"),
        ):
            if is_there and name not in self._names:
                param = f"messages.{index}.{'tool_calls' if name == 'tool_calls' else 'role'}"
                raise RequestError(
                    f"{param}: this model's chat template knows no {what}, so it cannot show them to the model.",
                    param=param,
                    code="unsupported_by_template",
                )

    @staticmethod
    def _texts(content: object, where: str) -> list[str]:
        if not isinstance(content, list | tuple):
            raise RequestError(
                f"{where} must be a string or a list of parts, got {type(content).__name__}.", param=where
            )
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

    def _run(self, data: Mapping[str, Any], stand_ins: Mapping[int, str], max_work: int = MAX_WORK) -> str:
        size = sum(len(text) + 16 for text in strings_in(data))
        variables = {**self._tokens, BUDGET: Budget(size, max_work), _STAND_INS_KEY: stand_ins, **data}
        try:
            return self._template.render(variables)
        except _RefusedError as error:
            raise RequestError(str(error), param="messages") from None
        except Exception as error:  # a template can raise anything that Python's operators raise
            raise RequestError(
                f"The chat template cannot render these messages: {_said(error)}", param="messages"
            ) from None

    def _needs_parts(self) -> bool:
        """Whether the template reads content as a list of parts only: tried with a text it has to show."""
        probe = "PROBE"

        def shows(content: Any) -> bool:
            data = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
            try:
                return probe in self._run({**data, "add_generation_prompt": True}, {}, MAX_WORK // 20)
            except RequestError:
                return False

        return not shows(probe) and shows([{"type": "text", "text": probe}])


def need_free(variables: Mapping[str, Any]) -> None:
    """Raise RequestError for variables that are not the caller's to set."""
    if taken := variables.keys() & RESERVED:
        raise RequestError(f"A chat template's variable {min(taken)!r} cannot be replaced.", param=min(taken))


def _names(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a template's code holds: attributes, keys and other constant texts, which tell what it may know of a
    message; and its variables."""
    tree = _ENVIRONMENT.parse(source)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | texts), frozenset(node.name for node in tree.find_all(nodes.Name))


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


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
    raise _RefusedError(str(message)[:MAX_REFUSAL_CHARS].strip() or "The chat template refuses these messages.")


def _now(form: str) -> str:
    """The date as datetime.strftime writes it."""
    if len(form) > 100:
        raise SecurityError(f"strftime_now: at most 100 characters are supported, not {len(form)}")
    return datetime.now().strftime(form)


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


_STAND_INS_KEY = "stand-ins"
"""No template can write this name."""
_ENVIRONMENT = Sandbox(
    functions={"raise_exception": _refuse, "strftime_now": _now},
    filters={"tojson": _to_json},
    extensions=[_GenerationTag, loopcontrols],
)
_ARGUMENTS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")
RESERVED = frozenset({*_ARGUMENTS, "bos_token", "eos_token", "self", BUDGET, _STAND_INS_KEY, *_ENVIRONMENT.globals})
"""Variables that no caller may set: what a rendering's own arguments are named, and what every template can rely on."""
