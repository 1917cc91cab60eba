"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.admission import Principal
from server.kinds import Kind
from server.routes.body import read_body
from server.routes.service import Service, answer_id, principal_of, service_of
from server.schemas.chat import AnswerMessage, ChatChoice, ChatChunks, ChatCompletion, ChatCompletionRequest
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
    id, created = answer_id("chatcmpl"), int(time.time())
    choices = service.choices(model, body, [prompt], answer_id=id, principal=principal, param="messages")
    if body.stream:
        encoder = ChatChunks(
            id=id,
            created=created,
            model=body.model,
            fingerprint=service.fingerprint(model),
            with_usage=body.include_usage,
        )
        events = service.events(model, choices, request, encoder, body)
        return EventStream(events, headers=headers, request_id=request.state.request_id)
    answers, usage = await service.whole(model, choices, request)
    answer = ChatCompletion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=service.fingerprint(model),
        choices=[
            ChatChoice(index=i, message=AnswerMessage(content=one.text), finish_reason=one.finish_reason)
            for i, one in enumerate(answers)
        ],
        usage=usage,
    )
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
