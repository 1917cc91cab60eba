"""What every handler works with, and the way from a validated body to the engine's requests."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HTTPRequest

from engine import logs
from engine.errors import ContextLengthError, EngineOverloadedError, RequestError
from engine.features import need_feature
from engine.request import Capabilities, EmbedRequest, EncoderInfo, Request, TextInput
from engine.sampling.grammar import GrammarCompiler
from engine.text import EncoderText
from engine.text.stand_ins import strings_in
from server.admission import Principal
from server.errors import ClientDisconnectedError, ModelNotFoundError, NotReadyError
from server.generation import Answer, Choice, Generation, Piece
from server.kinds import Kind, need_kind
from server.loading import Loader
from server.metrics import Metrics
from server.registry import Registry, ServedModel
from server.schemas.common import (
    NO_DETAILS,
    ChunkEncoder,
    GenerationBody,
    TokenDetails,
    Usage,
    concrete_seed,
)
from server.settings import Settings, version
from server.streaming import DONE, KEEP_ALIVE

MAX_UNCHECKED = 64
"""Most grammars that wait to be checked; each may take a second."""

Checked = TypeVar("Checked")

LONG_TEXT = 16_384
"""Characters (or tokens, the other way) above which tokenizing leaves the event loop, which streams wait for."""


def without_details(_: Piece) -> TokenDetails:
    """What a chunk says of its tokens unless the request asks."""
    return NO_DETAILS


def _draw_seed() -> int:
    return secrets.randbits(64)


@dataclass(slots=True, kw_only=True)
class Service:
    """The application's state: one per app, made by create_app."""

    settings: Settings
    metrics: Metrics
    models: Registry
    loader: Loader
    draw_seed: Callable[[], int] = _draw_seed
    draining: bool = False
    grammars: GrammarCompiler = field(default_factory=GrammarCompiler)
    # One thread of its own: grammars that take long wait for each other, and nobody else waits for them.
    _num_unchecked: int = 0
    _grammar_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammar"))

    @property
    def started(self) -> bool:
        """Every engine's start has ended, well or not."""
        return all(model.started for model in self.models)

    @property
    def status(self) -> str:
        """starting, ready, restarting, draining, dead or, where every model was unloaded, empty."""
        return "draining" if self.draining else self.models.state

    async def stop(self, drain: float) -> None:
        """End every model as `Engine.stop` does, and all that is being loaded. Idempotent."""
        staying = {id(model.engine): model.engine for model in self.models if not model.draining}
        await asyncio.gather(self.loader.close(drain), *(engine.stop(drain) for engine in staying.values()))
        await asyncio.gather(*(model.engine.stop(drain=0.0) for model in self.models if model.draining))
        self._grammar_thread.shutdown(cancel_futures=True)
        self.grammars.close()

    def fingerprint(self, model: ServedModel) -> str:
        """`system_fingerprint`: equal fingerprints and seeds give equal answers."""
        if not model.fingerprint:
            known = model.engine.capabilities()
            weights = (known.checkpoint_sha256, known.checkpoint_format, known.weights, known.kv_cache_dtype)
            what = (version(), known.engine, known.model, weights, known.isa)
            limits = (known.max_model_len, self.settings.default_max_tokens, sorted(model.generation_defaults.items()))
            model.fingerprint = "fp_" + hashlib.sha256(repr((what, limits)).encode()).hexdigest()[:12]
        return model.fingerprint

    def need_model(self, name: str | None, kind: Kind | None = None, what: str = "") -> ServedModel:
        """The model of that name; without a name the only one there is.

        Raises ModelNotFoundError where there is none, NotReadyError for one that is being loaded, and RequestError
        unless it is of the `kind` that `what` needs (None: any will do).
        """
        model = self._only_model() if name is None else self._named_model(name)
        if kind is not None:
            need_kind(model.name, model.kind, kind, what)
        return model

    @property
    def _served(self) -> str:
        return ", ".join(self.models.names) or "none"

    def _named_model(self, name: str) -> ServedModel:
        model = self.models.find(name)
        if model is not None:
            return model
        load = self.loader.find(name)
        if load is not None and load.is_under_way:
            raise NotReadyError(f"The model {name!r} is being loaded ({load.step}). Try again later.")
        raise ModelNotFoundError(
            f"The model {name[:128]!r} does not exist here; this server has {self._served}.", param="model"
        )

    def _only_model(self) -> ServedModel:
        models = list(self.models)
        if not models:
            raise ModelNotFoundError("This server has no model just now.", param="model")
        if len(models) > 1:
            raise RequestError(
                f"model is missing: name one of those that this server has ({self._served}).",
                param="model",
                code="missing_required_parameter",
            )
        return models[0]

    def need_ready(self, model: ServedModel) -> Capabilities:
        """The engine's capabilities. Raises NotReadyError while it cannot take a request."""
        if (status := "draining" if self.draining else model.state) != "ready":
            raise NotReadyError(f"The engine of {model.name} is {status}. Try again later.")
        return model.capabilities()

    async def encode(self, model: ServedModel, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a plain text."""
        if len(text) < LONG_TEXT:
            return model.text.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(model.text.encode, text, add_special_tokens=add_special_tokens)

    def need_encoder(self, model: ServedModel) -> EncoderInfo:
        """What a model's encoder can do. Raises NotReadyError while it cannot take a request."""
        known = self.need_ready(model).encoder
        assert known is not None, "an encoder's engine says what it can do"
        return known

    async def encode_texts(
        self, model: ServedModel, texts: Sequence[str | tuple[str, str]], truncate: int | None
    ) -> list[TextInput]:
        """What an encoder is given of texts, or of pairs of them."""
        assert isinstance(model.text, EncoderText)
        size = sum(len(text) if isinstance(text, str) else len(text[0]) + len(text[1]) for text in texts)
        if size < LONG_TEXT:
            return model.text.encode_texts(texts, truncate=truncate)
        return await asyncio.to_thread(model.text.encode_texts, texts, truncate=truncate)

    async def embed(
        self, model: ServedModel, inputs: Sequence[TextInput], http: HTTPRequest, *, priority: int
    ) -> NDArray[np.float32]:
        """The vectors of texts, float32 [inputs, output size]. A caller that goes away takes its request along."""
        if priority:
            need_feature(model.engine.capabilities(), "priority", model=model.name, param="priority")
        request = EmbedRequest(
            request_id=answer_id("embd"),
            model=self.need_encoder(model).model,
            inputs=list(inputs),
            priority=priority,
            trace=logs.current_request(),
        )
        with model.gate.enter(1):
            computing = asyncio.create_task(model.engine.embed(request))
            leaving = asyncio.create_task(_disconnect(http))
            try:
                await asyncio.wait((computing, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not computing.done():
                    raise ClientDisconnectedError("The caller went away.")
                vectors = await computing
            finally:
                for task in (computing, leaving):
                    task.cancel()
                await asyncio.gather(computing, leaving, return_exceptions=True)
        model.metrics.prompt_tokens.inc(sum(len(text.token_ids) for text in inputs))
        return vectors

    async def encode_chat(
        self, model: ServedModel, messages: Sequence[dict[str, Any]], arguments: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of a conversation; `arguments` are the template's, as `TemplateBody.template_arguments` gives them.

        Variables of the caller can make a template work for as long as it may, so such a rendering is never done here.
        """
        if len(arguments) <= 2 and sum(map(len, strings_in(messages))) < LONG_TEXT:
            return model.text.encode_chat(messages, **arguments)
        return await asyncio.to_thread(model.text.encode_chat, messages, **arguments)

    async def decode(self, model: ServedModel, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens among it."""
        if len(token_ids) < LONG_TEXT:
            return model.text.decode(token_ids, skip_special=False)
        return await asyncio.to_thread(model.text.decode, token_ids, skip_special=False)

    async def grammar(self, model: ServedModel, body: GenerationBody) -> str | None:
        """The grammar of the form that an answer is to have; None where any will do.

        Raises RequestError for one that cannot be, and for a model that has no end to put to an answer, and
        EngineOverloadedError where too many wait already.
        """
        asked = body.asked_form()
        if asked is None:
            return None
        form, param = asked
        need_feature(model.engine.capabilities(), "grammar", model=model.name, param=param)
        known = self.grammars.cached(form, param)
        if known is not None:
            return known
        return await self.checked(self.grammars.compile, form, param)

    async def checked(self, check: Callable[..., Checked], *arguments: Any) -> Checked:
        """What a check of a grammar gives, made outside the event loop, one after another.

        Raises EngineOverloadedError where too many wait already.
        """
        if self._num_unchecked >= MAX_UNCHECKED:
            raise EngineOverloadedError("Too many grammars wait to be checked. Try again later.")
        self._num_unchecked += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._grammar_thread, check, *arguments)
        finally:
            self._num_unchecked -= 1

    def choices(
        self,
        model: ServedModel,
        body: GenerationBody,
        prompts: Sequence[Sequence[int]],
        *,
        answer_id: str,
        principal: Principal,
        param: str,
        default_max_tokens: int | None = None,
        grammar: str | None = None,
        show_markers: bool = False,
    ) -> list[Choice]:
        """One choice per prompt and answer asked for, in the order of the answer's indices.

        Answers to one prompt share seed and group and differ in choice_index. Raises RequestError; ContextLengthError
        for a prompt that leaves no room. A limit on the answer is, in this order, the request's, the operator's, the
        generation config's, `default_max_tokens`, and what the context leaves.
        """
        known, defaults = model.engine.capabilities(), model.generation_defaults
        usual = self.settings.default_max_tokens or int(defaults.get("max_tokens", 0)) or default_max_tokens
        seed = concrete_seed(body.seed, self.draw_seed())
        _need_features(model, known, body)
        bad_words = model.text.bad_words(body.bad_words) if body.bad_words else ()
        choices: list[Choice] = []
        for p, whole in enumerate(prompts):
            prompt = body.truncated(whole, known.max_model_len)
            if not prompt:
                raise RequestError(f"{param} has no tokens.", param=param)
            room = known.max_model_len - len(prompt)
            if room < 1:
                raise ContextLengthError(max_model_len=known.max_model_len, num_tokens=len(prompt), param=param)
            asked = body.asked_max_tokens
            max_tokens = min((usual or room) if asked is None else asked, room)
            sampling = body.sampling(
                max_tokens=max_tokens, vocab_size=known.vocab_size, defaults=defaults, bad_words=bad_words
            )
            for c in range(body.num_choices):
                index = p * body.num_choices + c
                if c > 0 and not body.stream:  # a whole answer takes the prompt's from the first choice
                    sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
                request = Request(
                    request_id=f"{answer_id}-{index}",
                    model=known.model,
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    seed=seed,
                    any_seed=body.seed is None,
                    choice_index=c,
                    group_id=f"{answer_id}-{p}" if body.num_choices > 1 else "",
                    priority=body.priority or 0,
                    tenant=principal.tenant,
                    cache_salt=body.cache_salt or "",  # the engine keeps tenants apart by itself
                    grammar=grammar,
                    trace=logs.current_request(),
                )
                stream = model.text.stream(
                    sampling.stop,
                    sampling.min_tokens,
                    include_stop=sampling.include_stop_str_in_output,
                    skip_special=sampling.skip_special_tokens,
                    show_markers=show_markers,
                )
                choices.append(Choice(index, request, stream, keeps_token_ids=bool(body.return_token_ids)))
        return choices

    @asynccontextmanager
    async def generate(
        self, model: ServedModel, choices: Sequence[Choice], http: HTTPRequest
    ) -> AsyncIterator[Generation]:
        """Run choices, holding room for them at the gate."""
        with model.gate.enter(len(choices)):
            async with Generation(
                model.engine, choices, receive=http.receive, metrics=model.metrics, arrived=http.state.arrived
            ) as generation:
                http.state.generation = generation  # for the access log
                yield generation

    async def whole(
        self, model: ServedModel, choices: Sequence[Choice], http: HTTPRequest
    ) -> tuple[list[Answer], Usage]:
        """Whole answers, by index."""
        answers = [Answer() for _ in choices]
        async with self.generate(model, choices, http) as generation:
            while not generation.is_done():
                for piece in await generation.pieces():
                    answers[piece.index].add(piece)
            return answers, generation.usage()

    async def events(
        self,
        model: ServedModel,
        choices: Sequence[Choice],
        http: HTTPRequest,
        encoder: ChunkEncoder,
        body: GenerationBody,
        preludes: Sequence[str] = (),
        *,
        prelude_details: Callable[[Piece], TokenDetails] = without_details,
        details: Callable[[Piece], TokenDetails] = without_details,
        write: Callable[[Piece, Usage | None], list[bytes]] | None = None,
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events of streamed answers. `preludes`, by index, is text that comes before a choice's own;
        `prelude_details`, of a choice's first piece, and `details` are what chunks say of tokens. `write` makes the
        chunks of a piece where they are more than its text."""
        interval = self.settings.keep_alive_interval
        begun: set[int] = set()
        async with self.generate(model, choices, http) as generation:
            while not generation.is_done():
                pieces = await generation.pieces(interval)
                usage = generation.usage() if body.continuous_usage else None
                frames: list[bytes] = [] if pieces else [KEEP_ALIVE]
                for piece in pieces:
                    if piece.index not in begun:
                        begun.add(piece.index)
                        prompt = choices[piece.index].request.prompt_token_ids if body.return_token_ids else None
                        frames.append(encoder.start(piece.index, usage, prompt))
                        if preludes:
                            prelude = preludes[piece.index]
                            frames.append(encoder.text(piece.index, prelude, usage, prelude_details(piece)))
                    if write is not None:
                        frames += write(piece, usage)
                        continue
                    if piece.text or piece.tokens or piece.token_ids:
                        frames.append(encoder.text(piece.index, piece.text, usage, details(piece)))
                    if piece.finish_reason is not None:
                        frames.append(encoder.finish(piece.index, piece.finish_reason, usage))
                if generation.is_done():
                    if body.include_usage:
                        frames.append(encoder.usage(generation.usage()))
                    frames.append(DONE)
                yield b"".join(frames)


def _need_features(model: ServedModel, known: Capabilities, body: GenerationBody) -> None:
    """Raises RequestError for what a request asks for and its engine lacks."""
    for name, asked in (
        ("logprobs", body.num_logprobs is not None),
        ("prompt_logprobs", body.num_prompt_logprobs is not None),
        ("priority", bool(body.priority)),
        ("cache_salt", body.cache_salt is not None),
    ):
        if asked:
            need_feature(known, name, model=model.name, param=name)


async def _disconnect(http: HTTPRequest) -> None:
    """Until the caller goes away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def answer_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


async def service_of(request: HTTPRequest) -> Service:
    """Dependency: the application's service. Like all of them no plain function, which would be called in a thread."""
    service: Service = request.app.state.service
    return service


async def principal_of(request: HTTPRequest) -> Principal:
    """Dependency: who asks, as the door found out."""
    principal: Principal = request.state.principal
    return principal
