"""Answers that call tools or reason: the grammar that a request's answers are held to, and what is read out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.errors import RequestError
from engine.features import need_feature
from engine.sampling.tool_grammar import Thinks, tool_grammar
from engine.text.answer_parser import AnswerParser, CallBegin, Content, Event, Reasoning
from server.generation import Answer, Piece, Stop
from server.registry import ServedModel
from server.routes.service import Service
from server.schemas.chat import AnswerMessage, ChatChunks, ChatCompletionRequest, FinishedBy
from server.schemas.common import NO_DETAILS, TokenDetails, Usage
from server.schemas.tools import AnswerFunction, AnswerToolCall, call_id, chosen


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers to a request are written, and so how they are read."""

    grammar: str | None = None
    parser: Callable[[], AnswerParser] | None = None  # one for each answer; None: their text is all there is
    id_length: int | None = None  # of calls


async def reading(service: Service, model: ServedModel, body: ChatCompletionRequest, prompt: list[int]) -> Reading:
    """Raises RequestError for tools that cannot be held to their schemas, naming the tool.

    Beside tools, a form of JSON is that of answers that call none. With tool_choice none the tools stay in the prompt,
    as in vLLM, and the answer cannot hold what begins a call.
    """
    text = model.text
    calls, names = chosen(body.tool_choice, body.tools or ())
    asked = body.asked_form()
    content = await service.grammar(model, body)
    if asked is not None and calls == "none":  # it begins at the answer's first character: nothing is said before it
        return Reading(content)
    begun = text.begins_reasoning(prompt)
    thinks: Thinks = "must" if begun else "may" if text.reasons else "no"
    form = text.tool_format
    if not body.tools or form is None:
        if not text.reasons:
            return Reading()
        return Reading(None, lambda: AnswerParser(None, reasons=True, in_reasoning=begun))
    if asked is not None and calls == "auto":
        if form.only_first:
            raise RequestError(
                f"{asked[1]} and calls of tools cannot be told apart as {model.name} writes them: leave one out.",
                param=asked[1],
            )
        form = dataclasses.replace(form, only_first=True)
    need_feature(model.engine.capabilities(), "grammar", model=model.name, param="tools")
    schemas = {
        tool.function.name: (f"tools.{i}.function.parameters", tool.schema_of_arguments(f"tools.{i}"))
        for i, tool in enumerate(body.tools)
    }
    called = {name: schemas[name] for name in names}
    arguments = {name: schema for name, (_, schema) in called.items()}

    def grammar(special: dict[str, int]) -> str:
        return tool_grammar(
            form,
            arguments,
            calls=calls,
            several=body.parallel_tool_calls is not False,
            thinks=thinks,
            special=special,
            content=content if calls == "auto" else None,
        )

    plain = grammar({})
    if not service.grammars.knows_tools(plain):
        await service.checked(service.grammars.check_tools, plain, called)
    tools = None if calls == "none" else form
    return Reading(
        grammar(dict(text.marker_ids)) if text.marker_ids else plain,
        lambda: AnswerParser(tools, arguments, reasons=text.reasons, in_reasoning=begun),
        form.id_length,
    )


def message_of(answer: Answer, how: Reading) -> tuple[AnswerMessage, FinishedBy]:
    """A whole answer's message, and its finish reason."""
    if how.parser is None:
        return _message(answer.text), answer.finish_reason
    parser = how.parser()
    content, reasoning = "", ""
    calls: list[AnswerToolCall] = []
    for event in [*parser.feed(answer.text), *parser.finish()]:
        match event:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallBegin(_, name):
                made = AnswerToolCall(id=call_id(how.id_length), function=AnswerFunction(name=name, arguments=""))
                calls.append(made)
            case _:
                calls[event.index].function.arguments += event.text
    message = _message(content or (None if calls else ""), reasoning or None, calls or None)
    return message, _reason(answer.finish_reason, parser)


def _message(
    content: str | None, reasoning: str | None = None, calls: list[AnswerToolCall] | None = None
) -> AnswerMessage:
    return AnswerMessage(content=content, reasoning=reasoning, reasoning_content=reasoning, tool_calls=calls)


@dataclass(slots=True)
class EventWriter:
    """The chunks of streamed answers that are parsed, each by a parser of its own."""

    how: Reading
    encoder: ChatChunks
    details: Callable[[Piece], TokenDetails]
    _parsers: dict[int, AnswerParser] = field(default_factory=dict)

    def __call__(self, piece: Piece, usage: Usage | None) -> list[bytes]:
        """What a choice gained. Details of tokens go with the first chunk of the text that they brought."""
        parser = self._parsers.get(piece.index)
        if parser is None:
            assert self.how.parser is not None
            parser = self._parsers[piece.index] = self.how.parser()
        events = parser.feed(piece.text)
        if piece.finish_reason is not None:
            events += parser.finish()
        details = self.details(piece) if piece.tokens or piece.token_ids else NO_DETAILS
        if not events and details is not NO_DETAILS:
            events = [Content("")]
        frames = []
        for event in events:
            frames.append(self._frame(piece.index, event, usage, details))
            details = NO_DETAILS
        if piece.finish_reason is not None:
            frames.append(self.encoder.finish(piece.index, _reason(piece.finish_reason, parser), usage))
        return frames

    def _frame(self, index: int, event: Event, usage: Usage | None, details: TokenDetails) -> bytes:
        id = call_id(self.how.id_length) if isinstance(event, CallBegin) else ""
        return self.encoder.event(index, event, id, usage, details)


def _reason(reason: Stop, parser: AnswerParser) -> FinishedBy:
    return "tool_calls" if reason == "stop" and parser.num_calls else reason
