"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from server.admission import Principal
from server.routes.body import read_body
from server.routes.service import Service, principal_of, service_of
from server.schemas.common import need_tokens
from server.schemas.tokenization import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest

router = APIRouter()


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """The token ids of a text, or of a conversation up to where its answer begins."""
    body, headers = await read_body(request, service, TokenizeRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model)
    max_model_len = service.need_ready(model).max_model_len
    if body.prompt is None:
        tokens = await service.encode_chat(model, body.for_template(), body.template_arguments())
    else:
        tokens = await service.encode(model, body.prompt, add_special_tokens=body.add_special_tokens is not False)
    strs = model.text.pieces(tokens) if body.return_token_strs else None
    return _answer(Tokenized(count=len(tokens), max_model_len=max_model_len, tokens=tokens, token_strs=strs), headers)


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """The text of token ids, special tokens among it: what `/tokenize` took, where that was whole characters."""
    body, headers = await read_body(request, service, DetokenizeRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model)
    need_tokens("tokens", body.tokens, service.need_ready(model).vocab_size)
    return _answer(Detokenized(prompt=await service.decode(model, body.tokens)), headers)


def _answer(answer: BaseModel, headers: dict[str, str]) -> Response:
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")
