"""The whole server on one page: settings and models, each with its engine, become an ASGI application."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from engine.errors import SeraphError
from server.admission import AdminKeys, HostPolicy, Keys
from server.errors import error_response
from server.loading import Loader
from server.metrics import Metrics
from server.middleware import Door, RequestContext
from server.openapi import openapi
from server.registry import Registry, ServedModel
from server.routes import admin, chat, completions, documentation, embeddings, health, tokenization
from server.routes import models as model_routes
from server.routes.service import Service
from server.settings import Settings, version

logger = logging.getLogger("seraph.server")


def create_app(
    settings: Settings,
    models: Iterable[ServedModel],
    *,
    make_loader: Callable[[Settings, Registry], Loader] = Loader,
    on_started: Callable[[SeraphError | None], None] = lambda error: None,
) -> FastAPI:
    """The ASGI application over models whose engines have not been started.

    Its lifespan starts the engines side by side and beside serving, so that health checks are answered meanwhile, calls
    `on_started` with what kept one from starting (None: nothing), and stops them at the end.
    """
    metrics = Metrics()
    registry = Registry(metrics, max_running=settings.max_running, max_waiting=settings.max_waiting)
    for model in models:
        registry.add(model)
    service = Service(settings=settings, metrics=metrics, models=registry, loader=make_loader(settings, registry))

    async def start() -> None:
        failure: SeraphError | None = None
        starting = [asyncio.create_task(_start(model, service)) for model in registry if not model.host]
        try:
            await asyncio.gather(*starting)
        except SeraphError as error:
            failure = error
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
        if not service.draining:  # else what ended a start was the stop
            on_started(failure)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(start())
        try:
            yield
        finally:
            service.draining = True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await service.stop(drain=0.0)  # what was allowed to finish has finished: connections close first

    middleware = [  # outermost first
        Middleware(RequestContext, metrics=metrics),
        Middleware(
            Door,
            keys=Keys(settings.api_key),
            admin_keys=AdminKeys(settings.admin_key),
            hosts=HostPolicy(settings.host, settings.allowed_host),
        ),
    ]
    if settings.cors_origin:  # before the door: a preflight carries no key, and a 401 must be readable
        middleware.insert(
            1,
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "x-seraph-ignored", "retry-after"],
            ),
        )
    app = FastAPI(
        title="Seraph",
        version=version(),
        lifespan=lifespan,
        middleware=middleware,
        openapi_url=None,  # routes/documentation.py has both: FastAPI's page loads scripts from elsewhere
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        **_without_telemetry(),
    )
    app.state.service = service
    app.add_exception_handler(SeraphError, _on_error)
    app.add_exception_handler(HTTPException, _on_error)
    for routes in (chat, completions, embeddings, tokenization, model_routes, admin, health, documentation):
        app.include_router(routes.router)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def _without_telemetry() -> dict[str, Any]:
    """What newer versions of FastAPI would tell, /metrics does."""
    if "telemetry" not in inspect.signature(FastAPI.__init__).parameters:
        return {}
    return {"telemetry": {"tracing": False, "metrics": False, "logs": False, "operation_spans": False}}


async def _start(model: ServedModel, service: Service) -> None:
    """Start a model's engine, and with it the encoders that live in its process."""
    guests = service.models.guests(model)
    try:
        await model.engine.start()
        for one in (model, *guests):
            one.known = one.capabilities()
    except SeraphError as error:
        if len(service.models) > 1 and not service.draining:  # which one it is
            logger.warning("%s was not started: %s", model.name, error)
        raise
    finally:
        for one in (model, *guests):
            one.started = True


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error, request.state.request_id)
