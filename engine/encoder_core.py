"""An encoder alone, driven as a decoder's core is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig, available_cpus, memory_limit
from engine.core import EngineCore
from engine.embedder import Embedder
from engine.errors import ConfigError, RequestError
from engine.features import features_of
from engine.models.spec import EncoderSpec
from engine.request import Capabilities, Embedded, EmbedRequest, EngineStats, Request, TokenDelta

if TYPE_CHECKING:
    from engine.weights import PackedModel


class EncoderCore:
    """An encoder alone, driven as an EngineCore is."""

    def __init__(
        self,
        config: EngineConfig,
        model: PackedModel[EncoderSpec],
        *,
        memory: Callable[[], int] = memory_limit,
        exit_status: int = 0,
    ) -> None:
        self.config = config
        self.model_name = model.name
        self.max_model_len = model.info.spec.max_position
        self._embedder = Embedder(model, config, memory=memory(), exit_status=exit_status)
        self._embedded: list[Embedded] = []

    def add(self, request: Request) -> None:
        """Refuse a request to continue a prompt: raises RequestError."""
        raise RequestError(
            f"{self.model_name} is an encoder: it makes vectors of texts and continues none.",
            param="model",
            code="model_not_supported",
        )

    def embed(self, request: EmbedRequest) -> None:
        """See EngineCore.embed."""
        self._embedder.add(request)

    def abort(self, request_id: str) -> None:
        """See EngineCore.abort."""
        self._embedder.abort(request_id)

    def step(self) -> list[TokenDelta]:
        """Compute a piece of the encoder's work."""
        self._embedded += self._embedder.advance()
        return []

    def take_embedded(self) -> list[Embedded]:
        """See EngineCore.take_embedded."""
        embedded, self._embedded = self._embedded, []
        return embedded

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return self._embedder.has_work

    def stats(self) -> EngineStats:
        return EngineStats(**self._embedder.counters())

    def capabilities(self) -> Capabilities:
        info = self._embedder.info
        return Capabilities(
            engine="native",
            model=self.model_name,
            max_model_len=info.max_input_len,
            vocab_size=info.vocab_size,
            features=features_of("native", self._embedder.features),
            isa=self._embedder.program.isa,
            threads=self.config.threads or available_cpus(),
            max_position=info.max_input_len,
            checkpoint_format=info.checkpoint_format,
            num_parameters=info.num_parameters,
            weights=info.weights,
            encoder=info,
        )

    def check_integrity(self) -> None:
        """See EngineCore.check_integrity."""
        self._embedder.check_integrity()

    def close(self) -> None:
        """Stop the threads and free the memory. Idempotent; the core cannot be used afterwards."""
        self._embedder.close()


def build_core(
    config: EngineConfig,
    model: PackedModel[Any],
    encoder: PackedModel[EncoderSpec] | None = None,
    *,
    exit_status: int = 0,
) -> EngineCore | EncoderCore:
    """The core of a mapped model, whichever kind it is, with `encoder` beside it; `exit_status` as of EngineCore.

    Raises ConfigError for an encoder beside an encoder, and as EngineCore.
    """
    if not isinstance(model.info.spec, EncoderSpec):
        return EngineCore(config, model, encoder, exit_status=exit_status)
    if encoder is not None:
        raise ConfigError(
            f"embedding_model goes with a decoder, and {model.name} is an encoder itself: leave embedding_model out."
        )
    return EncoderCore(config, model, exit_status=exit_status)
