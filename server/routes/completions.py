"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.admission import Principal
from server.kinds import Kind
from server.registry import ServedModel
from server.routes.body import read_body
from server.routes.service import Service, answer_id, principal_of, service_of
from server.schemas.common import need_tokens
from server.schemas.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionChoice,
    CompletionChunks,
    CompletionRequest,
)
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
    preludes = _echoes(model, body, prompts) if body.echo else []
    id, created = answer_id("cmpl"), int(time.time())
    choices = service.choices(
        model, body, prompts, answer_id=id, principal=principal, param="prompt", default_max_tokens=DEFAULT_MAX_TOKENS
    )
    if body.stream:
        encoder = CompletionChunks(
            id=id,
            created=created,
            model=body.model,
            fingerprint=service.fingerprint(model),
            with_usage=body.include_usage,
        )
        events = service.events(model, choices, request, encoder, body, preludes)
        return EventStream(events, headers=headers, request_id=request.state.request_id)
    answers, usage = await service.whole(model, choices, request)
    answer = Completion(
        id=id,
        created=created,
        model=body.model,
        system_fingerprint=service.fingerprint(model),
        choices=[
            CompletionChoice(
                index=i,
                text=(preludes[i] if preludes else "") + one.text,
                finish_reason=one.finish_reason,
            )
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
