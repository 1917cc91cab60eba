"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Depends

from server.admission import Principal
from server.errors import NotReadyError
from server.registry import ServedModel
from server.routes.service import Service, principal_of, service_of
from server.schemas.models import Model, ModelList

router = APIRouter()


def _model(model: ServedModel, name: str) -> Model:
    if model.known is None:
        raise NotReadyError(f"The engine of {model.name} is {model.state}. Try again later.")
    return Model(
        id=name,
        created=model.created,
        root=_public(model.source),
        max_model_len=model.known.max_model_len,
        generation_defaults=dict(model.generation_defaults),
        kind=model.kind,
        state=model.state,
        tool_format=None if model.text.tool_format is None else model.text.tool_format.name,
        reasoning=model.text.reasons,
    )


def _public(source: str) -> str:
    """A model's source as callers may see it: its last part where it is a path of this machine."""
    return source if source.partition(":")[0] in ("hf", "pypi") else PurePath(source).name


@router.get("/v1/models")
async def list_models(
    service: Annotated[Service, Depends(service_of)], principal: Annotated[Principal, Depends(principal_of)]
) -> ModelList:
    """The models served here, under each of their names."""
    return ModelList(data=[_model(model, name) for model in service.models for name in model.names])


@router.get("/v1/models/{id:path}")
async def get_model(
    id: str,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Model:
    """One model."""
    return _model(service.need_model(id), id)
