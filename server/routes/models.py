"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Depends

from server.admission import Principal
from server.routes.service import Service, principal_of, service_of
from server.schemas.models import Model, ModelList

router = APIRouter()


def _model(service: Service, name: str, max_model_len: int) -> Model:
    return Model(
        id=name,
        created=service.created,
        root=_public(service.settings.model),
        max_model_len=max_model_len,
        generation_defaults=dict(service.generation_defaults),
    )


def _public(source: str) -> str:
    """A model's source as callers may see it: its last part where it is a path of this machine."""
    return source if source.partition(":")[0] in ("hf", "pypi") else PurePath(source).name


@router.get("/v1/models")
async def list_models(
    service: Annotated[Service, Depends(service_of)], principal: Annotated[Principal, Depends(principal_of)]
) -> ModelList:
    """The models served here."""
    max_model_len = service.need_ready().max_model_len
    return ModelList(data=[_model(service, name, max_model_len) for name in service.settings.model_names])


@router.get("/v1/models/{id:path}")
async def get_model(
    id: str,
    service: Annotated[Service, Depends(service_of)],
    principal: Annotated[Principal, Depends(principal_of)],
) -> Model:
    """One model."""
    service.need_model(id)
    return _model(service, id, service.need_ready().max_model_len)
