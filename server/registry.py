"""The models that the server has: each with its names, its engine, its text side and its queue."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from engine.backends.base import Engine
from engine.request import Capabilities
from server.admission import Gate
from server.errors import ConflictError
from server.generation import Text
from server.kinds import Kind
from server.metrics import Metrics, ModelMetrics


@dataclass(slots=True, kw_only=True, eq=False)
class ServedModel:
    """One model. An encoder has the engine of the decoder whose process it lives in, and names it as its `host`."""

    names: tuple[str, ...]  # in the API; the first one is its own
    source: str
    engine: Engine
    text: Text
    kind: Kind = Kind.GENERATE
    host: str = ""
    generation_defaults: Mapping[str, float] = field(default_factory=dict)  # fields that a request leaves out
    weights_bytes: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    started: bool = False  # the engine's start has ended, well or not
    draining: bool = False  # it takes no more requests
    known: Capabilities | None = None  # the engine's, once it was ready
    fingerprint: str = ""  # made when it is first asked for
    metrics: ModelMetrics = field(init=False)
    gate: Gate = field(init=False)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def state(self) -> str:
        """starting, ready, restarting, draining or dead."""
        if self.draining:
            return "draining"
        if self.engine.ready:
            return "ready"
        if not self.started:
            return "starting"
        return "restarting" if self.engine.alive else "dead"

    def capabilities(self) -> Capabilities:
        """What the model can do. Known once its engine has started; raises EngineDeadError before that."""
        known = self.engine.capabilities()
        encoder = known.encoder
        if not self.host or encoder is None:
            return known
        return msgspec.structs.replace(
            known,
            model=encoder.model,
            max_model_len=encoder.max_input_len,
            max_position=encoder.max_input_len,
            vocab_size=encoder.vocab_size,
            checkpoint_format=encoder.checkpoint_format,
            num_parameters=encoder.num_parameters,
            weights=encoder.weights,
        )

    @property
    def kv_cache_bytes(self) -> int:
        """Memory for its keys and values; an encoder keeps none."""
        return 0 if self.known is None or self.host else self.known.kv_cache_bytes

    @property
    def nbytes(self) -> int:
        """Memory that it was promised."""
        return self.weights_bytes + self.kv_cache_bytes


class Registry:
    """The served models by their names, in the order in which they came."""

    def __init__(self, metrics: Metrics, *, max_running: int, max_waiting: int) -> None:
        self._metrics = metrics
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._models: list[ServedModel] = []

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(tuple(self._models))

    def __len__(self) -> int:
        return len(self._models)

    @property
    def names(self) -> list[str]:
        """Every name that the API knows."""
        return [name for model in self._models for name in model.names]

    def add(self, model: ServedModel) -> None:
        """Serve one more. Raises ConflictError for a name that is taken."""
        for name in model.names:
            if self.find(name) is not None:
                raise ConflictError(f"There is a model {name!r} already.", param="model", code="model_exists")
        model.metrics = self._metrics.of(model.name)
        model.gate = Gate(max_running=self._max_running, max_waiting=self._max_waiting, metrics=model.metrics)
        self._models.append(model)

    def remove(self, model: ServedModel) -> None:
        """Serve it no longer; its engine is the caller's to stop."""
        self._models.remove(model)
        model.metrics.forget()

    def find(self, name: str) -> ServedModel | None:
        """The model of that name."""
        return next((model for model in self._models if name in model.names), None)

    def guests(self, host: ServedModel) -> list[ServedModel]:
        """The models that live in the engine process of another."""
        return [model for model in self._models if model.host == host.name and model is not host]

    def states(self) -> dict[str, str]:
        """The state of each model that is to stay, by its own name."""
        return {model.name: model.state for model in self._models if not model.draining}

    @property
    def state(self) -> str:
        """Of all together: ready only where every one is, dead where one is dead for good; empty without any."""
        states = set(self.states().values())
        for state in ("dead", "starting", "restarting", "ready"):
            if state in states:
                return state
        return "empty"
