"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.admission import Principal
from server.generation import Piece
from server.kinds import Kind
from server.routes.body import read_body
from server.routes.calls import EventWriter, message_of, reading
from server.routes.service import Service, answer_id, principal_of, service_of
from server.schemas.chat import ChatChoice, ChatChunks, ChatCompletion, ChatCompletionRequest
from server.schemas.common import NO_DETAILS, TokenDetails
from server.schemas.logprobs import LogprobWriter
from server.streaming import EventStream

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatCompletion)
async def create_chat_completion(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """Answer a conversation, whole or streamed."""
    body, headers = await read_body(request, service, ChatCompletionRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model, Kind.GENERATE, "chat")
    messages = body.for_template()
    service.need_ready(model)
    prompt = await service.encode_chat(model, messages, body.template_arguments())
    how = await reading(service, model, body, prompt)
    id, created = answer_id("chatcmpl"), int(time.time())
    choices = service.choices(
        model,
        body,
        [prompt],
        answer_id=id,
        principal=principal,
        param="messages",
        grammar=how.grammar,
        show_markers=how.parser is not None,
    )
    writer = LogprobWriter(model.text, as_ids=bool(body.return_tokens_as_token_ids))
    if body.stream:
        encoder = ChatChunks(
            id=id,
            created=created,
            model=body.model,
            fingerprint=service.fingerprint(model),
            with_usage=body.include_usage,
        )

        def details(piece: Piece) -> TokenDetails:
            if not (body.logprobs or body.return_token_ids):
                return NO_DETAILS
            return TokenDetails(
                logprobs=writer.chat(piece.tokens) if body.logprobs else None,
                token_ids=piece.token_ids if body.return_token_ids else None,
            )

        write = None if how.parser is None else EventWriter(how, encoder, details)
        events = service.events(model, choices, request, encoder, body, details=details, write=write)
        return EventStream(events, headers=headers, request_id=request.state.request_id)
    answers, usage = await service.whole(model, choices, request)
    read = [message_of(one, how) for one in answers]
    answer = ChatCompletion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=service.fingerprint(model),
        choices=[
            ChatChoice(
                index=i,
                message=message,
                logprobs=writer.chat(one.tokens) if body.logprobs else None,
                finish_reason=reason,
                token_ids=one.token_ids if body.return_token_ids else None,
            )
            for i, (one, (message, reason)) in enumerate(zip(answers, read, strict=True))
        ],
        usage=usage,
        prompt_logprobs=None
        if body.prompt_logprobs is None
        else writer.prompt(answers[0].prompt_logprobs, body.prompt_logprobs),
        prompt_token_ids=prompt if body.return_token_ids else None,
    )
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
