"""vLLM as an Engine: token ids in, deltas out, and a new one where it dies.

vLLM's client side lives in this process, as it does in vLLM's own server, and its engine in processes of its own. If
those die, requests in flight wait for new ones and go on after the last token that was received.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.native import State
from engine.backends.vllm_cpus import USABLE, keep_to, stay_off
from engine.backends.vllm_journal import Journal
from engine.backends.vllm_options import MISSING, VllmOptions, engine_config, is_installed, reason_of
from engine.backends.vllm_request import delta_of, prompt_of, sampling_of
from engine.backends.vllm_stats import Counters, logger_class
from engine.config import prepare_vllm, seraph_home
from engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    RequestError,
    SeraphError,
)
from engine.features import features_of
from engine.models.spec import EncoderSpec
from engine.request import (
    Capabilities,
    EmbedRequest,
    EncoderInfo,
    EngineStats,
    FinishReason,
    Request,
    TextInput,
    TokenDelta,
    WeightsInfo,
    need_a_choice,
)
from engine.resident import num_parameters

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("seraph.engine")

POLL = 0.1
"""Seconds between two looks at whether vLLM is alive, and at its log while it starts."""

_STARTS = threading.Lock()
"""One start at a time: what vLLM is told by the environment, and keeps in its modules, is of the whole process."""

MAX_DEATHS = 3
"""Deaths of the engine that a request may live through: it may be what kills it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSupervision:
    """How patient we are with vLLM's processes. Seconds, unless said otherwise."""

    quick_death: float = 60.0  # an engine that dies sooner after it was ready died quickly
    max_quick_deaths: int = 3  # in a row; then no new one is started
    restart_wait: float = 10.0  # how long a request that arrives during a restart waits for it
    shutdown_timeout: float = 10.0


class VllmEngine:
    """`engine.backends.base.Engine` over vLLM's AsyncLLM."""

    def __init__(
        self,
        options: VllmOptions,
        *,
        eos_token_ids: Sequence[int],
        home: Path | None = None,
        checkpoint_format: str = "",
        encoder: EncoderSpec | None = None,
        supervision: VllmSupervision = VllmSupervision(),
    ) -> None:
        self._options = options
        self._eos_token_ids = tuple(eos_token_ids)
        self._logs = seraph_home(home) / "logs"
        self._checkpoint_format = checkpoint_format
        self._encoder = encoder
        self._supervision = supervision
        self._state = State.NEW
        self._state_changed = asyncio.Event()  # replaced at each change
        self._client: AsyncLLM | None = None
        self._journal: Journal | None = None
        self._capabilities: Capabilities | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._running: set[str] = set()
        self._all_finished = asyncio.Event()
        self._all_finished.set()
        self._counters = Counters()
        self._num_restarts = 0

    @property
    def alive(self) -> bool:
        return self._state in (State.READY, State.RESTARTING, State.STOPPING)

    @property
    def ready(self) -> bool:
        return self._state is State.READY

    @property
    def pid(self) -> int | None:
        """vLLM's engine process."""
        processes = _processes(self._client)
        return processes[0].pid if processes else None

    def launch(self) -> None:
        """Nothing can be done before there is an event loop."""

    def kill(self) -> None:
        """Undo a `launch` that no `start` followed."""

    async def start(self) -> None:
        """Import vLLM, and have it load its model. Takes from half a minute to many; the log tells how far it is.

        Raises ConfigError for what vLLM does not accept, EngineError with the first error of its processes where those
        fail; no process is left then.
        """
        assert self._state is State.NEW, f"the engine {self._state.value}"
        if not is_installed():
            raise ConfigError(MISSING)
        self._client = await self._create()
        self._capabilities = await self._describe(self._client)
        self._enter(State.READY)
        self._supervisor = asyncio.get_running_loop().create_task(self._supervise(), name="vllm-supervisor")

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """See Engine.generate. Raises RequestError also for an id that is in use, and for what vLLM does not do."""
        _need_possible(request, self.capabilities().vocab_size, self._eos_token_ids)
        if request.request_id in self._running:
            raise RequestError(f"request_id {request.request_id!r} is in use.", param="request_id")
        said = list(request.output_token_ids)
        client = await self._ready_client(self._supervision.restart_wait)
        with self._tracked(request.request_id):
            for attempt in range(MAX_DEATHS + 1):
                try:
                    async with contextlib.aclosing(self._attempt(client, request, said, attempt)) as deltas:
                        async for delta in deltas:
                            said += delta.token_ids
                            yield delta
                            if delta.finish_reason is not None:
                                return
                    raise EngineError(f"request {request.request_id}: vLLM's answers ended without a reason")
                except EngineDeadError:
                    begun = len(said) > len(request.output_token_ids)
                    if attempt == MAX_DEATHS or (request.grammar is not None and begun):
                        raise
                    client = await self._ready_client(None)

    async def embed(self, request: EmbedRequest) -> NDArray[np.float32]:
        """See Engine.embed."""
        if request.request_id in self._running:
            raise RequestError(f"request_id {request.request_id!r} is in use.", param="request_id")
        if not self._options.pooling:
            raise RequestError(f"{self._options.model} makes no vectors.", param="model")
        client = await self._ready_client(self._supervision.restart_wait)
        with self._tracked(request.request_id):
            for attempt in range(MAX_DEATHS + 1):
                try:
                    tasks = [
                        asyncio.create_task(self._vector(client, f"{request.request_id}-{attempt}-{i}", one, request))
                        for i, one in enumerate(request.inputs)
                    ]
                    try:
                        vectors = np.stack(await asyncio.gather(*tasks))
                        self._counters.num_encoded_texts += len(request.inputs)
                        self._counters.num_encoded_tokens += sum(len(one.token_ids) for one in request.inputs)
                        return vectors
                    finally:
                        for task in tasks:
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
                except EngineDeadError:
                    if attempt == MAX_DEATHS:
                        raise
                    client = await self._ready_client(None)
        raise AssertionError("unreachable")

    def capabilities(self) -> Capabilities:
        if self._capabilities is None:
            raise EngineDeadError(f"The engine {State.NEW.value}.")
        return self._capabilities

    async def stats(self) -> EngineStats:
        """As of vLLM's last step."""
        known = self._capabilities
        return self._counters.snapshot(0 if known is None else known.num_kv_blocks, self._num_restarts)

    async def stop(self, drain: float) -> None:
        """See Engine.stop. Idempotent."""
        if self._state in (State.READY, State.RESTARTING):
            self._enter(State.STOPPING)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_finished.wait(), timeout=drain)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
            self._supervisor = None
        self._enter(State.STOPPED)
        await self._end_client()
        if self._journal is not None:
            self._journal.remove()

    # --- Requests ---

    async def _attempt(
        self, client: AsyncLLM, request: Request, said: Sequence[int], attempt: int
    ) -> AsyncGenerator[TokenDelta, None]:
        """What one life of vLLM makes of a request, from the tokens on that were said before.

        Raises EngineDeadError where that life ends, RequestError for what vLLM refuses.
        """
        position = len(said)
        most = request.sampling.max_tokens
        if said and most is not None and position >= most:  # the last token came, and no word of it being the last
            yield TokenDelta(request_id=request.request_id, position=position, finish_reason=FinishReason.LENGTH)
            return
        params = sampling_of(request, said, self._eos_token_ids)
        # Two lives of one request have two names: vLLM may still be about to abort the first.
        name = f"{request.request_id}-{attempt}" if attempt else request.request_id
        answers = client.generate(prompt_of(request, said), params, name, priority=request.priority)
        async with contextlib.aclosing(answers), _deadline(request.deadline) as late:
            with self._translated():
                async for output in answers:
                    delta = delta_of(request, output, position)
                    position += len(delta.token_ids)
                    yield delta
        if late():
            yield TokenDelta(request_id=request.request_id, position=position, finish_reason=FinishReason.DEADLINE)

    async def _vector(self, client: AsyncLLM, name: str, text: TextInput, request: EmbedRequest) -> NDArray[np.float32]:
        """float32 [output size]"""
        from vllm.inputs import TokensPrompt
        from vllm.pooling_params import PoolingParams

        known = self.capabilities().features
        prompt: Any = TokensPrompt(prompt_token_ids=list(text.token_ids))
        embeds = "embed" in known
        params = PoolingParams(task="embed" if embeds else "classify", use_activation=None if embeds else False)
        if text.second is not None:
            params.extra_kwargs = {"compressed_token_type_ids": text.second}
        with self._translated():
            async for output in client.encode(prompt, params, name, priority=request.priority):
                return np.asarray(output.outputs.data, np.float32).reshape(-1)
        raise EngineError(f"request {request.request_id}: vLLM made no vector")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """vLLM's errors as ours."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError
        from vllm.v1.engine.exceptions import EngineGenerateError

        try:
            yield
        except VllmDeadError:
            raise EngineDeadError(f"The engine process {self._how_it_died()} while it held the request.") from None
        except EngineGenerateError as error:
            raise EngineError(f"vLLM: {reason_of(error.__cause__ or error)}") from error
        except (VLLMClientError, ValueError, TypeError) as error:
            raise RequestError(f"vLLM does not take the request: {reason_of(error)}") from error

    async def _ready_client(self, patience: float | None) -> AsyncLLM:
        """The client that takes a request now. Raises EngineOverloadedError or EngineDeadError where there is none."""
        # The supervisor may not have noticed yet what the caller has.
        if self._state is State.READY and self._client is not None and self._client.errored:
            self._enter(State.RESTARTING)
        if self._state is State.RESTARTING:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    while self._state is State.RESTARTING:
                        await self._state_changed.wait()
            if self._state is State.RESTARTING:
                raise EngineOverloadedError(f"vLLM is restarting; it was not ready after {patience:g} s.")
        if self._state is not State.READY:
            raise EngineDeadError(f"The engine {self._state.value}.")
        assert self._client is not None
        return self._client

    @contextlib.contextmanager
    def _tracked(self, request_id: str) -> Iterator[None]:
        self._running.add(request_id)
        self._all_finished.clear()
        try:
            yield
        finally:
            self._running.discard(request_id)
            if not self._running:
                self._all_finished.set()

    # --- vLLM's processes ---

    async def _create(self) -> AsyncLLM:
        """A new vLLM, when it is ready."""
        keep_to(USABLE)  # its processes inherit them, and may use all
        journal = Journal(self._logs, self._options.model)
        task = asyncio.create_task(asyncio.to_thread(self._create_blocking, journal))
        began = time.monotonic()
        logger.info("vLLM: importing it, for %s", self._options.model)
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=POLL)
                for stage in journal.news():
                    logger.info("vLLM: %s (%.0f s)", stage, time.monotonic() - began)
            client = task.result()
        except asyncio.CancelledError:
            # It cannot be interrupted: what it makes is ended when it is there.
            task.add_done_callback(_end_late)
            raise
        except SeraphError:
            journal.remove()
            raise
        except Exception as error:
            raise EngineError(
                f"vLLM could not start {self._options.model}: {journal.cause() or reason_of(error)} (its log: "
                f"{journal.path})"
            ) from error
        logger.info("vLLM: ready (%.0f s)", time.monotonic() - began)
        if self._journal is not None:
            self._journal.remove()
        self._journal = journal
        for process in _processes(client)[:1]:
            if (left := stay_off(process.pid)) != USABLE:
                cpus = ", ".join(map(str, sorted(left)))
                logger.info("vLLM: its threads are bound to CPUs; the server keeps to CPU %s", cpus)
        return client

    def _create_blocking(self, journal: Journal) -> AsyncLLM:
        with _STARTS:
            prepare_vllm(log=journal.path, log_config=journal.config_path)
            try:
                client_class = _client_class()
            except Exception as error:
                raise EngineError(f"vLLM cannot be imported: {reason_of(error)}") from error
            return client_class.from_vllm_config(
                engine_config(self._options), stat_loggers=[logger_class(self._counters)], enable_log_requests=False
            )

    async def _describe(self, client: AsyncLLM) -> Capabilities:
        config = client.vllm_config
        model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
        tasks = set(await client.get_supported_tasks())
        features = {"generate", "logprobs", "prompt_logprobs", "grammar"} if "generate" in tasks else set()
        if self._options.pooling:
            features |= {"embed"} & tasks or ({"score"} if "classify" in tasks else set())
        blocks, block_size = cache.num_gpu_blocks or 0, cache.block_size or 0
        spec, itemsize = self._encoder, model.dtype.itemsize
        weights = WeightsInfo(
            nbytes=0 if spec is None else num_parameters(spec) * itemsize,
            bits=0 if model.quantization else 8 * itemsize,
        )
        kv_dtype = model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype
        return Capabilities(
            engine="vllm",
            version=f"vLLM {_version()} on {_device(config)}",
            model=self._options.model,
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            features=features_of("vllm", features),
            num_ranks=parallel.tensor_parallel_size * parallel.pipeline_parallel_size,
            max_position=getattr(model.hf_text_config, "max_position_embeddings", 0) or 0,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            checkpoint_format=self._checkpoint_format,
            num_parameters=0 if spec is None else num_parameters(spec),
            weights=weights,
            num_kv_blocks=blocks,
            kv_cache_tokens=blocks * block_size,
            kv_cache_bytes=cache.kv_cache_memory_bytes or 0,
            kv_cache_dtype=str(kv_dtype).removeprefix("torch."),
            encoder=None if spec is None else self._encoder_info(spec, model.max_model_len, weights),
        )

    def _encoder_info(self, spec: EncoderSpec, max_model_len: int, weights: WeightsInfo) -> EncoderInfo:
        return EncoderInfo(
            model=self._options.model,
            output_size=spec.output_size,
            max_input_len=min(spec.max_position, max_model_len),
            vocab_size=spec.vocab_size,
            num_labels=spec.num_labels,
            checkpoint_format=self._checkpoint_format,
            num_parameters=num_parameters(spec),
            weights=weights,
        )

    async def _supervise(self) -> None:
        """Replace vLLM whenever it dies, until that happens too often in too short a time."""
        num_quick_deaths = 0
        while True:
            ready_since = time.monotonic()
            while self._client is not None and not self._client.errored:  # noqa: ASYNC110  # a flag is all there is
                await asyncio.sleep(POLL)
            quick = time.monotonic() - ready_since < self._supervision.quick_death
            num_quick_deaths = num_quick_deaths + 1 if quick else 1
            log = "" if self._journal is None else self._journal.path
            logger.error(
                "the engine process %s with %d requests in flight (its log: %s)",
                self._how_it_died(),
                len(self._running),
                log,
            )
            self._journal = None  # it stays
            if self._state is State.STOPPING:
                return
            self._enter(State.RESTARTING)
            await self._end_client()
            while True:
                if num_quick_deaths >= self._supervision.max_quick_deaths:
                    logger.critical("vLLM died %d times in a row: giving up", num_quick_deaths)
                    self._enter(State.FAILED)
                    return
                try:
                    self._client = await self._create()
                except SeraphError as error:
                    logger.error("vLLM could not be started again: %s", error)
                    num_quick_deaths += 1
                else:
                    break
            self._num_restarts += 1
            self._enter(State.READY)

    async def _end_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await asyncio.to_thread(client.shutdown, self._supervision.shutdown_timeout)

    def _how_it_died(self) -> str:
        for process in _processes(self._client):
            code = process.exitcode
            if code is not None:
                return f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        return "died"

    def _enter(self, state: State) -> None:
        self._state = state
        changed, self._state_changed = self._state_changed, asyncio.Event()
        changed.set()


def _need_possible(request: Request, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
    """Raises RequestError for what would be lost without a word."""
    sampling = request.sampling
    if sampling.bad_words or sampling.allowed_token_ids:
        need_a_choice(sampling, vocab_size, eos_token_ids)
    if request.grammar is not None and request.output_token_ids:
        raise RequestError("vLLM cannot go on with an answer that has a form.", param="structured_outputs")


def _client_class() -> type[AsyncLLM]:
    from vllm.v1.engine.async_llm import AsyncLLM

    class Client(AsyncLLM):  # type: ignore[misc]
        """One that says nothing where the process ends at once, when the modules that it would need are gone."""

        def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
            if not is_finalizing():
                super().__del__()

    return Client


def _version() -> str:
    from vllm.version import __version__

    return str(__version__)


def _device(config: VllmConfig) -> str:
    """As "2 x NVIDIA H100" or "cpu"."""
    from vllm.platforms import current_platform

    number = config.parallel_config.world_size
    name = current_platform.device_type if current_platform.is_cpu() else current_platform.get_device_name()
    return f"{number} x {name}" if number > 1 else str(name)


def _processes(client: AsyncLLM | None) -> Sequence[Any]:
    """vLLM's engine processes on this machine, as long as it tells them."""
    resources = getattr(getattr(client, "engine_core", None), "resources", None)
    return getattr(getattr(resources, "engine_manager", None), "processes", None) or ()


def _end_late(task: asyncio.Task[AsyncLLM]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().shutdown(0)


@contextlib.asynccontextmanager
async def _deadline(when: float | None) -> AsyncIterator[Callable[[], bool]]:
    """Ends its body at a time, in Unix seconds; what it yields then tells so."""
    if when is None:
        yield lambda: False
        return
    timeout = asyncio.timeout(max(0.0, when - time.time()))
    with contextlib.suppress(TimeoutError):
        async with timeout:
            yield timeout.expired
