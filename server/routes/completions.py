"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from engine.request import TokenLogprobs
from server.admission import Principal
from server.generation import Answer, Choice, Piece, Text
from server.kinds import Kind
from server.registry import ServedModel
from server.routes.body import read_body
from server.routes.service import Service, answer_id, principal_of, service_of
from server.schemas.common import NO_DETAILS, TokenDetails, need_tokens
from server.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionChunks,
    CompletionRequest,
)
from server.schemas.logprobs import CompletionLogprobs, LogprobWriter
from server.streaming import EventStream

router = APIRouter()


@router.post("/v1/completions", response_model=Completion)
async def create_completion(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """Continue one or more texts, whole or streamed."""
    body, headers = await read_body(request, service, CompletionRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model, Kind.GENERATE, "completions")
    vocab_size = service.need_ready(model).vocab_size
    prompts = [await _token_ids(service, model, prompt, body, vocab_size) for prompt in body.prompts()]
    grammar = await service.grammar(model, body)
    id, created = answer_id("cmpl"), int(time.time())
    choices = service.choices(
        model,
        body,
        prompts,
        answer_id=id,
        principal=principal,
        param="prompt",
        default_max_tokens=DEFAULT_MAX_TOKENS,
        grammar=grammar,
    )
    details = _Details(body, model.text, choices, _echoes(model, body, prompts) if body.echo else [])
    if body.stream:
        encoder = CompletionChunks(
            id=id,
            created=created,
            model=body.model,
            fingerprint=service.fingerprint(model),
            with_usage=body.include_usage,
        )
        events = service.events(
            model,
            choices,
            request,
            encoder,
            body,
            details.preludes,
            prelude_details=details.of_prelude,
            details=details.of_piece,
        )
        return EventStream(events, headers=headers, request_id=request.state.request_id)
    answers, usage = await service.whole(model, choices, request)
    answer = Completion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=service.fingerprint(model),
        choices=[
            # A prompt's log-probabilities come with the first of its answers.
            details.choice(i, one, answers[i - i % body.num_choices].prompt_logprobs)
            for i, one in enumerate(answers)
        ],
        usage=usage,
    )
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


async def _token_ids(
    service: Service, model: ServedModel, prompt: str | list[int], body: CompletionRequest, vocab_size: int
) -> list[int]:
    if isinstance(prompt, str):
        return await service.encode(model, prompt, add_special_tokens=body.add_special_tokens is not False)
    need_tokens("prompt", prompt, vocab_size)
    return prompt


def _echoes(model: ServedModel, body: CompletionRequest, prompts: Sequence[list[int]]) -> list[str]:
    """Each choice's prompt as text, by index; of one that is cut what is left."""
    max_model_len = model.capabilities().max_model_len
    texts = []
    for given, token_ids in zip(body.prompts(), prompts, strict=True):
        kept = body.truncated(token_ids, max_model_len)
        is_shown = isinstance(given, str) and len(kept) == len(token_ids)
        texts.append(str(given) if is_shown else model.text.decode(kept))
    return [text for text in texts for _ in range(body.num_choices)]


@dataclass(slots=True)
class _Details:
    """What an answer says of tokens: log-probabilities and ids, where the request asks for them."""

    body: CompletionRequest
    text: Text
    choices: Sequence[Choice]
    preludes: list[str]  # the echoed prompts, by choice; none without echo
    writer: LogprobWriter = field(init=False)

    def __post_init__(self) -> None:
        self.writer = LogprobWriter(self.text, as_ids=bool(self.body.return_tokens_as_token_ids))

    def choice(self, index: int, answer: Answer, of_prompt: list[TokenLogprobs]) -> CompletionChoice:
        """A whole answer with its prompt's log-probabilities."""
        body = self.body
        logprobs = None
        if body.logprobs is not None:
            echoed = self._echoed(index, of_prompt) if self.preludes else None
            logprobs = self.writer.completion(answer.tokens, offset=self._offset(index), prompt=echoed)
        return CompletionChoice(
            index=index,
            text=(self.preludes[index] if self.preludes else "") + answer.text,
            logprobs=logprobs,
            finish_reason=answer.finish_reason,
            prompt_logprobs=None
            if body.prompt_logprobs is None
            else self.writer.prompt(of_prompt, body.prompt_logprobs),
            prompt_token_ids=self.choices[index].request.prompt_token_ids if body.return_token_ids else None,
            token_ids=answer.token_ids if body.return_token_ids else None,
        )

    def of_prelude(self, piece: Piece) -> TokenDetails:
        if self.body.logprobs is None:
            return NO_DETAILS
        return TokenDetails(logprobs=self._echoed(piece.index, piece.prompt_logprobs))

    def of_piece(self, piece: Piece) -> TokenDetails:
        wants_logprobs, wants_ids = self.body.logprobs is not None, bool(self.body.return_token_ids)
        if not (wants_logprobs or wants_ids):
            return NO_DETAILS
        offset = self._offset(piece.index)
        return TokenDetails(
            logprobs=self.writer.completion(piece.tokens, offset=offset) if wants_logprobs else None,
            token_ids=piece.token_ids if wants_ids else None,
        )

    def _offset(self, index: int) -> int:
        return len(self.preludes[index]) if self.preludes else 0

    def _echoed(self, index: int, of_prompt: list[TokenLogprobs]) -> CompletionLogprobs:
        prompt = self.choices[index].request.prompt_token_ids
        stream = self.text.stream((), 0)
        offsets: list[int] = []
        for token_id in prompt:
            offsets.append(stream.num_characters)
            stream.push(token_id)
        # Some tokenizers put a space before a text, which it does not have.
        added = max(0, stream.num_characters - len(self.preludes[index]))
        offsets = [max(0, offset - added) for offset in offsets]
        return self.writer.echo(prompt, offsets, of_prompt, self.body.logprobs or 0)
