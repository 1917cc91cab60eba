"""The engine processes of a start: models fetched and mapped, the memory divided, every process under way.

Nothing here needs the web framework or a tokenizer: those are imported while the engine processes map their models.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from engine.backends.base import Engine
from engine.backends.native import NativeEngine
from engine.cache.sizing import Needs, divide_kv_memory
from engine.config import AUTO_KV_SHARE, EngineConfig, has_gpu, memory_limit, parse_memory
from engine.errors import ConfigError
from engine.models.spec import EncoderSpec, ModelInfo
from engine.weights import PackedModel, load_packed
from server.kinds import Kind, kind_of
from server.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console

    from engine.weights.progress_bar import RichProgress


class Bars:
    """Progress bars that import their library when there is something to draw: a warm start has nothing."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bars: RichProgress | None = None

    def start(self, label: str, total_bytes: int | None) -> None:
        if self._bars is None:
            from engine.weights.progress_bar import RichProgress

            self._bars = RichProgress(self._console)
        self._bars.start(label, total_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._bars is not None:
            self._bars.advance(num_bytes)

    def done(self) -> None:
        if self._bars is not None:
            self._bars.done()

    def close(self) -> None:
        """Restore the terminal."""
        if self._bars is not None:
            self._bars.__exit__(None, None, None)


def fetch(config: EngineConfig) -> PackedModel[Any]:
    """Map a model, after fetching and packing it, with progress bars, where that has not happened yet."""
    with contextlib.closing(Bars()) as bars:
        return load_packed(config.model, home=config.home, progress=bars, **config.load_options())


class Loaded(Protocol):
    """A model as it lies on this machine: packed for our engine, or a folder for vLLM."""

    @property
    def info(self) -> ModelInfo[Any]: ...
    @property
    def nbytes(self) -> int:
        """Of the weights."""
        ...

    def close(self) -> None: ...


class Launchable(Engine, Protocol):
    """An engine that can be on its way before there is an event loop."""

    def launch(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Launched:
    """One model of a start. An encoder has the engine of its host, whose name it carries."""

    names: tuple[str, ...]
    source: str
    loaded: Loaded
    engine: Launchable
    host: str = ""


def launch(settings: Settings) -> list[Launched]:
    """Fetch every model, divide the memory, and start a process for each decoder, and for each encoder that none of
    them hosts; vLLM starts later. Each engine's `start` must follow, or `kill`. Raises SeraphError, and then no process
    is left."""
    return _launch_vllm(settings) if settings.uses_vllm else _launch_native(settings)


def _launch_vllm(settings: Settings) -> list[Launched]:
    from engine.backends.vllm import VllmEngine
    from engine.backends.vllm_options import MISSING, is_installed
    from engine.weights.described import describe_model

    if not is_installed():  # before anything is fetched
        raise ConfigError(MISSING)
    launched = []
    for names, source in zip(settings.model_names, settings.model, strict=True):
        with contextlib.closing(Bars()) as bars:
            model = describe_model(source, progress=bars)
        options = settings.vllm_options(
            model.folder,
            names[0],
            pooling=kind_of(model.info) is not Kind.GENERATE,
            kv_cache_bytes=_vllm_kv_bytes(settings),
        )
        options.command_line()  # what cannot be is said before vLLM is imported
        info = model.info
        engine = VllmEngine(
            options,
            eos_token_ids=info.eos_token_ids,
            checkpoint_format=info.checkpoint_format,
            encoder=info.spec if isinstance(info.spec, EncoderSpec) else None,
        )
        launched.append(Launched(names, source, model, engine))
    return launched


def _vllm_kv_bytes(settings: Settings) -> int | None:
    """Of each model. On CPUs vLLM by itself would take nearly all memory, on GPUs it takes what is left of theirs."""
    given, num_models = settings.kv_cache_memory, len(settings.model)
    if given is None:
        return None if has_gpu() else int(AUTO_KV_SHARE * memory_limit()) // num_models
    size = parse_memory(given)
    if isinstance(size, float):
        raise ConfigError(
            f"--kv-cache-memory must be a size, as 8GiB, for --engine vllm, got {given!r}. A share of a GPU's memory "
            "is --vllm-arg gpu-memory-utilization=0.9."
        )
    return size // num_models


def _launch_native(settings: Settings) -> list[Launched]:
    configs, names = settings.engine_configs(), settings.model_names
    if settings.embedding_model is not None:
        configs.append(replace(configs[0], model=settings.embedding_model))
    packed = [fetch(config) for config in configs]
    decodes = [kind_of(one.info) is Kind.GENERATE for one in packed]
    if settings.embedding_model is not None and decodes[-1]:
        raise ConfigError(f"--embedding-model {settings.embedding_model} is a language model, not an encoder.")
    decoders = [place for place, does in enumerate(decodes) if does]
    encoders = [place for place, does in enumerate(decodes) if not does]
    divided = divide_kv_memory(
        [configs[place] for place in decoders],
        [Needs.of(packed[place]) for place in decoders],
        other_bytes=sum(packed[place].nbytes for place in encoders),
    )
    configs = [config if place in encoders else divided[decoders.index(place)] for place, config in enumerate(configs)]
    # The one that the flag names, else the first one, lives beside the first decoder.
    guest = encoders[-1 if settings.embedding_model is not None else 0] if encoders and decoders else None
    if guest is not None:
        configs[decoders[0]] = replace(configs[decoders[0]], embedding_model=configs[guest].model)
    engines: dict[int, NativeEngine] = {}
    try:
        for place, config in enumerate(configs):
            if place != guest:
                engines[place] = NativeEngine(config)
                engines[place].launch()
    except BaseException:
        for engine in engines.values():
            engine.kill()
        raise
    launched = []
    for place, config in enumerate(configs):
        host = decoders[0] if place == guest else place
        hosted_by = "" if host == place else names[host][0]
        launched.append(Launched(names[place], config.model, packed[place], engines[host], hosted_by))
    return launched
