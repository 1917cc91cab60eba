"""The operator's routes, behind the admin key: POST, GET and DELETE /admin/models."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response

from engine.errors import RequestError
from server.errors import ModelNotFoundError, NotReadyError
from server.loading import Load
from server.registry import ServedModel
from server.routes.body import read_body
from server.routes.service import Service, service_of
from server.schemas.admin import AdminModel, AdminModelList, LoadModelRequest, Memory, Progress

router = APIRouter()

MAX_BODY_BYTES = 64 << 10
MAX_DRAIN = 3600.0


@router.post("/admin/models", status_code=202, response_model=AdminModel)
async def load_model(request: Request, service: Annotated[Service, Depends(service_of)]) -> Response:
    """Begin to load a model; GET tells what becomes of it."""
    body, _ = await read_body(request, service, LoadModelRequest, limit=MAX_BODY_BYTES)
    if not service.started:
        raise NotReadyError("The models that the server was started with are not there yet. Try again later.")
    load = service.loader.load(body.model, name=body.name, kv_cache_memory=body.kv_cache_memory)
    return _accepted(_of_load(load))


@router.get("/admin/models")
async def list_models(service: Annotated[Service, Depends(service_of)]) -> AdminModelList:
    """Every model: served, on its way in or out, or failed to load."""
    loader = service.loader
    return AdminModelList(
        data=[*map(_of_model, service.models), *map(_of_load, loader.loads)],
        memory=Memory(limit_bytes=loader.memory_limit, promised_bytes=loader.memory_used),
    )


@router.get("/admin/models/{name:path}")
async def get_model(name: str, service: Annotated[Service, Depends(service_of)]) -> AdminModel:
    """One model."""
    return _find(service, name)


@router.delete("/admin/models/{name:path}", status_code=202, response_model=AdminModel)
async def unload_model(
    name: str, service: Annotated[Service, Depends(service_of)], drain: Annotated[str | None, Query()] = None
) -> Response:
    """Begin to unload a model: `drain` seconds for requests that run, then they are cut off. GET tells when it is gone.

    A load under way is given up, and a failed one is forgotten.
    """
    service.loader.unload(name, service.settings.drain_timeout if drain is None else _seconds(drain))
    try:
        return _accepted(_find(service, name))
    except ModelNotFoundError:
        return Response(status_code=204)  # a failed load, which is gone at once


def _find(service: Service, name: str) -> AdminModel:
    if (load := service.loader.find(name)) is not None:
        return _of_load(load)
    if (model := service.models.find(name)) is not None:
        return _of_model(model)
    raise ModelNotFoundError(f"There is no model {name[:128]!r}.", param="name")


def _of_model(model: ServedModel) -> AdminModel:
    known = model.known
    return AdminModel(
        name=model.name,
        names=list(model.names),
        source=model.source,
        kind=model.kind,
        state=model.state,
        host=model.host or None,
        pid=model.engine.pid,
        weights_bytes=model.weights_bytes,
        kv_cache_bytes=model.kv_cache_bytes,
        kv_cache_tokens=0 if known is None or model.host else known.kv_cache_tokens,
        max_model_len=None if known is None else known.max_model_len,
    )


def _of_load(load: Load) -> AdminModel:
    work = load.work
    return AdminModel(
        name=load.name,
        names=[load.name],
        source=load.source,
        kind=None,
        state=load.step,
        reason=load.reason or None,
        progress=None if work is None else Progress(**msgspec.structs.asdict(work)),
        pid=load.pid,
        weights_bytes=load.weights_bytes,
        kv_cache_bytes=load.kv_cache_bytes,
        kv_cache_tokens=0,
        max_model_len=None,
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
        if not 0 <= seconds <= MAX_DRAIN:  # written so that NaN fails it
            raise ValueError(text)
    except ValueError:
        raise RequestError(
            f"drain must be a number of seconds between 0 and {MAX_DRAIN:g}, got {text[:40]!r}.",
            param="drain",
            code="invalid_value",
        ) from None
    return seconds


def _accepted(model: AdminModel) -> Response:
    return Response(model.model_dump_json(), 202, media_type="application/json")
