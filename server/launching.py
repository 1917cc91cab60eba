"""The engine processes of a start: models fetched and mapped, the memory divided, every process under way.

Nothing here needs the web framework or a tokenizer: those are imported while the engine processes map their models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from engine.backends.native import NativeEngine
from engine.cache.sizing import Needs, divide_kv_memory
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.weights import PackedModel, load_model
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


def fetch(config: EngineConfig, source: str | None = None) -> PackedModel:
    """Map a model (None: the configuration's), after fetching and packing it, with progress bars, where that has not
    happened yet."""
    with contextlib.closing(Bars()) as bars:
        return load_model(source or config.model, home=config.home, progress=bars, **config.load_options())


@dataclass(frozen=True, slots=True)
class Launched:
    """One model of a start. An encoder has the engine of its host, whose name it carries."""

    names: tuple[str, ...]
    source: str
    packed: PackedModel
    engine: NativeEngine
    host: str = ""


def launch(settings: Settings) -> list[Launched]:
    """Fetch every model, divide the memory, and start a process for each decoder. Each engine's `start` must follow, or
    `kill`. Raises SeraphError, and then no process is left."""
    configs, names = settings.engine_configs(), settings.model_names
    sources = [config.model for config in configs]
    if settings.embedding_model is not None:
        sources.append(settings.embedding_model)
    packed = [fetch(configs[0], source) for source in sources]
    generates = [kind_of(one.info) is Kind.GENERATE for one in packed]
    if settings.embedding_model is not None and generates[-1]:
        raise ConfigError(f"--embedding-model {settings.embedding_model} is a language model, not an encoder.")
    decoders = [place for place, does in enumerate(generates) if does]
    encoders = [place for place, does in enumerate(generates) if not does]
    configs = [configs[place] for place in decoders]
    if encoders:
        configs[:1] = [_with_encoders(configs, [sources[place] for place in encoders])]
    needs = [Needs.of(packed[place]) for place in decoders]
    configs = divide_kv_memory(configs, needs, other_bytes=sum(packed[place].nbytes for place in encoders))
    engines: list[NativeEngine] = []
    try:
        for config in configs:
            engines.append(NativeEngine(config))
            engines[-1].launch()
    except BaseException:
        for engine in engines:
            engine.kill()
        raise
    launched = {
        place: Launched(names[place], sources[place], packed[place], engine)
        for place, engine in zip(decoders, engines, strict=True)
    }
    for place in encoders:
        host = names[decoders[0]][0]
        launched[place] = Launched(names[place], sources[place], packed[place], engines[0], host)
    return [launched[place] for place in sorted(launched)]


def _with_encoders(configs: Sequence[EngineConfig], encoders: Sequence[str]) -> EngineConfig:
    """The first decoder's configuration, with the encoder that its engine hosts, wherever it was named."""
    if not configs:
        raise ConfigError(f"{', '.join(encoders)}: an embedding model needs a language model beside it.")
    if len(encoders) > 1:
        raise ConfigError(f"There can be one embedding model, got {', '.join(encoders)}.")
    return replace(configs[0], embedding_model=encoders[0])
