"""Health, version and metrics.

`/health/live` fails only when a restart would help: the engine is dead for good. `/health` and `/health/ready` fail
whenever a request would: while the engine starts, restarts or drains too.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from engine.errors import EngineError
from engine.request import EngineStats
from server.admission import Principal
from server.routes.service import Service, principal_of, service_of
from server.settings import version as seraph_version

router = APIRouter()


@router.get("/health")
@router.get("/health/ready")
async def ready(service: Annotated[Service, Depends(service_of)]) -> Response:
    """200 when a request would be taken now, else 503."""
    status = service.status
    headers = {} if status == "ready" else {"retry-after": "1"}
    return JSONResponse({"status": status}, 200 if status == "ready" else 503, headers=headers)


@router.get("/health/live")
async def live(service: Annotated[Service, Depends(service_of)]) -> Response:
    """200 unless the engine is dead for good."""
    status = service.status
    return JSONResponse({"status": status}, 503 if status == "dead" else 200)


@router.get("/version")
async def version(principal: Annotated[Principal, Depends(principal_of)]) -> dict[str, str]:
    """The server's version."""
    return {"version": seraph_version()}


@router.get("/metrics", response_class=Response)
async def metrics(
    service: Annotated[Service, Depends(service_of)], principal: Annotated[Principal, Depends(principal_of)]
) -> Response:
    """Prometheus metrics. Needs the key where one is set."""
    try:
        stats = await service.engine.stats()
    except EngineError:  # dead or starting: the server's own metrics are what an operator needs now
        stats = EngineStats()
    return Response(service.metrics.render(stats), media_type=CONTENT_TYPE_LATEST)
