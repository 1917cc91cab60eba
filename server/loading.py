"""Models that come and go while the server runs: fetched, packed, started and stopped beside the others."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from engine.backends.base import Engine
from engine.backends.native import NativeEngine
from engine.backends.packing import Work, pack_apart
from engine.cache.sizing import Needs, fit_kv_memory, kv_cache_bytes, need_room
from engine.config import EngineConfig, memory_limit
from engine.errors import RequestError, SeraphError, SourceError
from engine.features import BY_NAME, Has, not_supported
from engine.text import EncoderText, ModelText
from engine.weights import catalog, load_packed
from server.errors import ConflictError, ForbiddenError, ModelNotFoundError
from server.kinds import Kind, kind_of
from server.launching import Loaded
from server.registry import Registry, ServedModel
from server.settings import Settings, name_of

logger = logging.getLogger("seraph.server")

MAX_FAILED = 32
"""Failed loads that are remembered; beyond that the oldest are forgotten."""


class Step(enum.StrEnum):
    """Where a load is; once it is ready the registry has the model."""

    FETCHING = "fetching"
    PACKING = "packing"
    STARTING = "starting"
    CANCELLED = "cancelled"  # it was, and its end is under way
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Load:
    """A model on its way in, or what became of it."""

    name: str
    source: str
    step: Step = Step.FETCHING
    work: Work | None = None  # what is fetched or packed just now
    reason: str = ""  # it failed
    weights_bytes: int = 0  # of the memory, which it was promised once it was packed
    kv_cache_bytes: int = 0
    engine: Engine | None = field(default=None, repr=False)  # while it starts
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def is_under_way(self) -> bool:
        return self.step is not Step.FAILED

    @property
    def pid(self) -> int | None:
        """The engine process that is starting."""
        return None if self.engine is None else self.engine.pid

    def cancel(self) -> None:
        """Give it up. Once only: the end of its processes must not be interrupted."""
        if self.step not in (Step.CANCELLED, Step.FAILED):
            assert self.task is not None
            self.step = Step.CANCELLED
            self.task.cancel()

    def report(self, work: Work) -> None:
        self.work = work
        if self.step is not Step.CANCELLED:
            self.step = Step.PACKING if work.packing else Step.FETCHING


class Loader:
    """Loads and unloads models. All calls belong to the event loop; nothing here waits for disk, network or a process.

    `prepare` fetches and packs, `make_engine` makes an engine, `memory` tells the bytes that this process may use.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        *,
        prepare: Callable[[EngineConfig, Callable[[Work], None]], Awaitable[None]] = pack_apart,
        make_engine: Callable[[EngineConfig], Engine] = NativeEngine,
        memory: Callable[[], int] = memory_limit,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._prepare = prepare
        self._make_engine = make_engine
        self._memory = memory
        self._loads: dict[str, Load] = {}
        self._unloads: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def loads(self) -> list[Load]:
        """The models on their way in, and those that failed."""
        return list(self._loads.values())

    def find(self, name: str) -> Load | None:
        """The load of that name, failed or not."""
        return self._loads.get(name)

    @property
    def memory_limit(self) -> int:
        """Bytes that this process and its engines may use."""
        return self._memory()

    @property
    def memory_used(self) -> int:
        """Bytes that models were promised for weights, keys and values."""
        return sum(model.nbytes for model in self._registry) + sum(
            load.weights_bytes + load.kv_cache_bytes for load in self._loads.values()
        )

    def load(self, source: str, *, name: str | None = None, kv_cache_memory: str | int | None = None) -> Load:
        """Begin to load a model; what becomes of it is told by what this returns, and then by the registry.

        Raises ForbiddenError for a source that the operator has not allowed, ConflictError for a name that is taken,
        RequestError for what is no source.
        """
        if not isinstance(BY_NAME["runtime_models"].in_engine(self._settings.engine_name), Has):
            raise not_supported("runtime_models", self._settings.engine_name)
        if not self._settings.allow_remote_load and source not in {entry.name for entry in catalog()}:
            aliases = ", ".join(entry.name for entry in catalog())
            raise ForbiddenError(
                f"The model must be an alias of the catalogue ({aliases}). Other sources can be loaded where the "
                "server is started with --allow-remote-load.",
                param="model",
                code="remote_load_not_allowed",
            )
        try:
            called = name or name_of(source, strict=True)
        except SourceError as error:
            raise RequestError(str(error), param="model", code="unknown_source") from None
        self._need_free(called)
        config = self._settings.engine_config(source)
        if kv_cache_memory is not None or config.kv_cache_memory is not None:
            # The flag's memory was for the models of the start, who have it.
            tokens = None if kv_cache_memory is not None else config.kv_cache_tokens
            config = dataclasses.replace(config, kv_cache_memory=kv_cache_memory, kv_cache_tokens=tokens)
        load = self._loads[called] = Load(called, source)
        load.task = asyncio.create_task(self._load(load, config), name=f"load-{called}")
        load.task.add_done_callback(lambda task: self._ended(load))
        return load

    def unload(self, name: str, drain: float) -> None:
        """Begin to unload a model: it takes no more requests, and those it has may run for `drain` seconds more.

        Of a load under way this is the end, and a failed one is forgotten. Raises ModelNotFoundError, and ConflictError
        for a model that is on its way in or out, or shares its process with another.
        """
        if (load := self._loads.get(name)) is not None:
            if load.step is Step.FAILED:
                del self._loads[name]
            else:
                load.cancel()
            return
        model = self._registry.find(name)
        if model is None:
            raise ModelNotFoundError(f"There is no model {name[:128]!r} to unload.", param="name")
        if model.draining or not model.started:
            raise ConflictError(f"The model {model.name!r} is {model.state}.", code="model_busy")
        if others := [model.host] if model.host else [guest.name for guest in self._registry.guests(model)]:
            raise ConflictError(
                f"The model {model.name!r} shares its process with {', '.join(others)} and stays with the server.",
                code="model_shared",
            )
        model.draining = True
        task = asyncio.create_task(self._unload(model, drain), name=f"unload-{model.name}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    async def close(self, drain: float) -> None:
        """End loads at once, and wait up to `drain` seconds for unloads. Idempotent."""
        self._closed = True
        for load in self._loads.values():
            load.cancel()
        if loads := [load.task for load in self._loads.values() if load.task is not None]:
            await asyncio.wait(loads)
        if self._unloads:
            await asyncio.wait(self._unloads, timeout=drain)

    def _need_free(self, name: str) -> None:
        """Raises ConflictError for a name that a model or another load has."""
        if self._closed:
            raise ConflictError("The server is stopping.", code="model_busy")
        if self._registry.find(name) is not None:
            raise ConflictError(f"There is a model {name!r} already.", param="model", code="model_exists")
        if (load := self._loads.get(name)) is not None and load.step is not Step.FAILED:
            raise ConflictError(f"The model {name!r} is being loaded ({load.step}).", param="model", code="model_busy")

    async def _load(self, load: Load, config: EngineConfig) -> None:
        try:
            await self._bring_in(load, config)
        except Exception as error:
            if load.step is Step.CANCELLED:
                return  # whatever its end ran into
            if isinstance(error, SeraphError):
                logger.warning("loading %s failed: %s", load.name, error)
            else:
                logger.exception("loading %s failed", load.name)
            load.step, load.engine = Step.FAILED, None
            load.weights_bytes = load.kv_cache_bytes = 0
            load.reason = str(error) or type(error).__name__

    def _ended(self, load: Load) -> None:
        """Remember what failed, up to a number, and nothing else."""
        if load.step is not Step.FAILED and self._loads.get(load.name) is load:
            del self._loads[load.name]
        failed = [one.name for one in self._loads.values() if one.step is Step.FAILED]
        for name in failed[: max(0, len(failed) - MAX_FAILED)]:
            del self._loads[name]

    async def _bring_in(self, load: Load, config: EngineConfig) -> None:
        """From the source to a model that takes requests. Whatever keeps it from that leaves no process behind."""
        await self._prepare(config, load.report)
        load.step, load.work = Step.STARTING, None
        packed = await asyncio.to_thread(load_packed, config.model, home=config.home, **config.load_options())
        with contextlib.closing(packed):
            if kind_of(packed.info) is Kind.GENERATE:
                needs = Needs.of(packed)
                config = fit_kv_memory(config, needs, used=self.memory_used, memory=self._memory)
                load.kv_cache_bytes = kv_cache_bytes(config, needs.spec)
            else:
                need_room(config.model, packed.nbytes, used=self.memory_used, memory=self._memory)
            load.weights_bytes = packed.nbytes
            load.engine = engine = self._make_engine(config)
            stated = self._settings.generation_defaults()
            model = await asyncio.to_thread(
                served, self._settings, stated, packed, engine, names=(load.name,), source=load.source
            )
        try:
            await engine.start()
            model.started, model.known = True, engine.capabilities()
            self._registry.add(model)
            del self._loads[load.name]  # at once: nobody may find both, and its memory is counted as the model's
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(engine.stop(drain=0.0)))
            raise
        logger.info("%s is loaded: %d tokens of KV memory", model.name, model.known.kv_cache_tokens)

    async def _unload(self, model: ServedModel, drain: float) -> None:
        try:
            await model.engine.stop(drain)
        finally:
            self._registry.remove(model)
        logger.info("%s is unloaded", model.name)


def served(
    settings: Settings,
    stated: Mapping[str, float] | None,
    loaded: Loaded,
    engine: Engine,
    *,
    names: tuple[str, ...],
    source: str,
    host: str = "",
) -> ServedModel:
    """A model and its engine as the server has them; reads the tokenizer, which takes a while.

    `stated` are the operator's generation defaults; None: the model's own.
    """
    kind = kind_of(loaded.info)
    text: ModelText | EncoderText
    if kind is Kind.GENERATE:
        text = ModelText.from_info(
            loaded.info, chat_template=settings.chat_template_source(), tool_format=settings.tool_format_name()
        )
    else:
        text = EncoderText.from_info(loaded.info)
    return ServedModel(
        names=names,
        source=source,
        engine=engine,
        text=text,
        kind=kind,
        host=host,
        generation_defaults=loaded.info.generation_defaults if stated is None else stated,
        weights_bytes=loaded.nbytes,
    )
