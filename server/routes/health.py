"""Health, version and metrics.

`/health/live` fails only when a restart would help: an engine is dead for good. `/health` and `/health/ready` fail
whenever a request to one of the models would: while its engine starts, restarts or drains too.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import EngineError
from engine.request import EngineStats
from server.admission import Principal
from server.registry import ServedModel
from server.routes.service import Service, principal_of, service_of
from server.settings import version as seraph_version

router = APIRouter()


@router.get("/health")
@router.get("/health/ready")
async def ready(service: Annotated[Service, Depends(service_of)]) -> Response:
    """200 when a request to any model would be taken now, else 503."""
    status = service.status
    headers = {} if status == "ready" else {"retry-after": "1"}
    return JSONResponse(_body(service), 200 if status == "ready" else 503, headers=headers)


@router.get("/health/live")
async def live(service: Annotated[Service, Depends(service_of)]) -> Response:
    """200 unless an engine is dead for good."""
    return JSONResponse(_body(service), 503 if service.status == "dead" else 200)


def _body(service: Service) -> dict[str, Any]:
    """The status; where one of several models keeps the server from being ready, which one and why."""
    troubled = {name: state for name, state in service.models.states().items() if state != "ready"}
    several = len(service.models) > 1 and not service.draining
    return {"status": service.status, **({"models": troubled} if several and troubled else {})}


@router.get("/version")
async def version(principal: Annotated[Principal, Depends(principal_of)]) -> dict[str, str]:
    """The server's version."""
    return {"version": seraph_version()}


@router.get("/metrics", response_class=Response)
async def metrics(
    service: Annotated[Service, Depends(service_of)], principal: Annotated[Principal, Depends(principal_of)]
) -> Response:
    """Prometheus metrics. Needs the key where one is set."""
    served = [model for model in service.models if not model.host]  # an encoder's engine is its host's
    answers = await asyncio.gather(*map(_stats, served))
    stats = {model.name: answer for model, answer in zip(served, answers, strict=True)}
    vllm = any(model.known is not None and model.known.engine == "vllm" for model in served)
    return Response(service.metrics.render(stats, vllm=vllm), media_type=CONTENT_TYPE_LATEST)


async def _stats(model: ServedModel) -> EngineStats:
    try:
        return await model.engine.stats()
    except EngineError:  # dead or starting: the server's own metrics are what an operator needs now
        return EngineStats()
