"""POST /v1/embeddings, /v1/score and /v1/rerank."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request, Response
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.request import TextInput
from server.admission import Principal
from server.kinds import Kind
from server.registry import ServedModel
from server.routes.body import read_body
from server.routes.service import Service, answer_id, principal_of, service_of
from server.schemas.common import need_tokens
from server.schemas.embeddings import EmbeddingRequest, TextsBody, encode_embeddings, shortened
from server.schemas.scores import (
    Ranked,
    RankedText,
    RerankRequest,
    RerankResult,
    Score,
    ScoreList,
    ScoreRequest,
    TextsUsage,
)

router = APIRouter()

LANGCHAIN = (
    "They are another tokenizer's. LangChain's OpenAIEmbeddings sends token ids of OpenAI's models unless it is made "
    "with check_embedding_ctx_length=False: then it sends text."
)


@router.post("/v1/embeddings")
async def create_embeddings(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """The vectors of one text or many."""
    body, headers = await read_body(request, service, EmbeddingRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model, Kind.EMBED, "embeddings")
    known = service.need_encoder(model)
    texts = body.texts()
    for text in texts:
        if not isinstance(text, str):
            try:
                need_tokens("input", text, known.vocab_size)
            except RequestError as error:
                raise RequestError(f"{error} {LANGCHAIN}", param="input", code="invalid_token_ids") from None
    written = [text for text in texts if isinstance(text, str)]
    if written:  # of either kind all are
        inputs = await service.encode_texts(model, written, body.truncate_prompt_tokens)
    else:
        inputs = [TextInput(text) for text in texts if not isinstance(text, str)]
    vectors = shortened(await _vectors(service, model, body, inputs, request), body.dimensions)
    answer = encode_embeddings(
        body.model, vectors, as_base64=body.encoding_format == "base64", num_tokens=_num_tokens(inputs)
    )
    return Response(answer, headers=headers, media_type="application/json")


@router.post("/v1/score", response_model=ScoreList)
async def score(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """How well the texts of each pair go together, from 0 to 1."""
    body, headers = await read_body(request, service, ScoreRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model, Kind.SCORE, "scores")
    scores, usage = await _scores(service, model, body, body.pairs(), request)
    answer = ScoreList(
        id=answer_id("score"),
        created=int(time.time()),
        model=body.model,
        data=[Score(index=i, score=value) for i, value in enumerate(scores)],
        usage=usage,
    )
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


@router.post("/v1/rerank", response_model=RerankResult)
async def rerank(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Response:
    """Documents by how well they answer a query, the best first."""
    body, headers = await read_body(request, service, RerankRequest, limit=service.settings.max_body_bytes)
    model = service.need_model(body.model, Kind.SCORE, "reranking")
    scores, usage = await _scores(service, model, body, body.pairs(), request)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: body.top_n]
    shown = body.return_documents is not False
    answer = RerankResult(
        id=answer_id("rerank"),
        model=body.model,
        usage=usage,
        results=[
            Ranked(index=i, document=RankedText(text=body.documents[i]) if shown else None, relevance_score=scores[i])
            for i in best
        ],
    )
    return Response(answer.model_dump_json(exclude_none=True), headers=headers, media_type="application/json")


async def _scores(
    service: Service, model: ServedModel, body: TextsBody, pairs: list[tuple[str, str]], request: Request
) -> tuple[list[float], TextsUsage]:
    known = service.need_encoder(model)
    if known.num_labels != 1:
        raise RequestError(
            f"The model {model.name!r} sorts texts into {known.num_labels} classes: it scores none.",
            param="model",
            code="model_not_supported",
        )
    inputs = await service.encode_texts(model, pairs, body.truncate_prompt_tokens)
    logits = await _vectors(service, model, body, inputs, request)
    scores: list[float] = (1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))).tolist()
    num_tokens = _num_tokens(inputs)
    return scores, TextsUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)


async def _vectors(
    service: Service, model: ServedModel, body: TextsBody, inputs: list[TextInput], request: Request
) -> NDArray[Any]:
    return await service.embed(model, inputs, request, priority=body.priority or 0)


def _num_tokens(inputs: list[TextInput]) -> int:
    return sum(len(text.token_ids) for text in inputs)
