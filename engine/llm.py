"""Offline use, without a server or another process:

with LLM() as llm:
    for completion in llm.chat([{"role": "user", "content": "What is the capital of France?"}]):
        print(completion.text)
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from engine.config import DEFAULT_MODEL, EngineConfig
from engine.core import EngineCore
from engine.encoder_core import EncoderCore, build_core
from engine.errors import EngineError, RequestError
from engine.llm_bars import GenerationBar, TextsBar, interrupts_deferred, loading_bars
from engine.models.spec import EncoderSpec
from engine.request import Embedded, EmbedRequest, FinishReason, Request, SamplingParams, TokenDelta, TokenLogprobs
from engine.sampling.grammar import GrammarCompiler
from engine.text import Detokenizer, EncoderText, ModelText
from engine.weights import PackedModel, load_encoder, load_packed

Prompt: TypeAlias = "str | Sequence[int]"
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
Sampling: TypeAlias = "SamplingParams | Sequence[SamplingParams]"

TEXTS_PER_REQUEST = 256
"""Texts that are tokenized together and then wait for the encoder together."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one prompt."""

    text: str  # without the stop string, the stop token and other special tokens
    token_ids: list[int]  # everything the model chose, the stop token included
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, where `SamplingParams.logprobs` asks
    # One for each prompt token, where `SamplingParams.prompt_logprobs` asks; nothing predicts the first.
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class LLM:
    """A model in this process. Close it, or use it as a context manager.

    `model` is an alias or a source as `seraph serve` takes it; `config` are fields of EngineConfig. A prompt is text,
    which gets the model's BOS, or token ids, which are taken as they are. Raises ConfigError or ModelError for what
    cannot be loaded, RequestError for a prompt or parameter that cannot be used, EngineError if a kernel fails.

    Ctrl-C stops a call after the step under way and leaves none of its requests behind; the LLM stays usable. Calls may
    come from several threads: each computes the steps that it waits for, and a step is one for the requests of all.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, progress: bool = True, **config: Any) -> None:
        self.config = EngineConfig(model=model, **config)
        with ExitStack() as undo:
            with loading_bars(progress) as bars:
                self._model: PackedModel[Any] = load_packed(
                    self.config.model, home=self.config.home, progress=bars, **self.config.load_options()
                )
                undo.callback(self._model.close)
                self._encoder: PackedModel[EncoderSpec] | None = None
                if self.config.embedding_model is not None:
                    self._encoder = load_encoder(
                        self.config.embedding_model,
                        home=self.config.home,
                        progress=bars,
                        **self.config.load_options(),
                    )
                    undo.callback(self._encoder.close)
            self.name = self._model.name
            encodes = isinstance(self._model.info.spec, EncoderSpec)
            self._text = None if encodes else ModelText.from_info(self._model.info)
            encoder = self._model if encodes else self._encoder
            self._encoder_text = None if encoder is None else EncoderText.from_info(encoder.info)
            self._core: EngineCore | EncoderCore | None = build_core(self.config, self._model, self._encoder)
            undo.pop_all()
        self._grammars = GrammarCompiler()
        self._serial = itertools.count()
        self._live: dict[str, _Stream] = {}
        self._embedded: dict[str, Embedded | None] = {}  # by request, None as long as it is not done
        # Reentrant: a stream that nobody holds any more may be collected, and aborted, while the engine is at work.
        self._lock = threading.RLock()
        self._at_work = False
        self._dropped: list[str] = []  # requests to be aborted when it is not

    @property
    def text(self) -> ModelText:
        """The decoder's text side. Raises RequestError for an encoder."""
        if self._text is None:
            raise RequestError(
                f"{self.name} is an encoder: it makes vectors of texts and continues none.", param="model"
            )
        return self._text

    def default_sampling(self) -> SamplingParams:
        """How a call without `sampling` samples: as the model's checkpoint or the catalogue says. The rest is unset."""
        return SamplingParams.from_defaults(self._model.info.generation_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> list[Completion]:
        """Continue one prompt or many, as one batch; one completion a prompt, in order.

        `sampling` is one SamplingParams for all prompts or one for each; None stands for `default_sampling()`. `seed`
        makes the draws: prompt i uses seed + i, so a call repeated gives the same tokens.
        """
        return self._complete([self._encode(prompt) for prompt in _as_prompts(prompts)], sampling, seed, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling: Sampling | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> list[Completion]:
        """The next assistant message of one conversation or many; otherwise as `generate`.

        A conversation is a list of {"role": ..., "content": ...} messages, rendered by the model's own chat template.
        """
        prompts = [self.text.encode_chat(conversation) for conversation in _as_conversations(conversations)]
        return self._complete(prompts, sampling, seed, progress)

    def stream(
        self, prompt: Prompt | Conversation, sampling: SamplingParams | None = None, *, seed: int = 0
    ) -> Generator[str, None, None]:
        """The text of one answer, piece by piece as it becomes certain.

        The request starts when the first piece is asked for; closing the generator aborts it.
        """
        if _is_conversation(prompt):
            token_ids = self.text.encode_chat(prompt)
        else:
            token_ids = self._encode(cast("Prompt", prompt))
        return self._pieces(token_ids, sampling or self.default_sampling(), seed)

    def embed(
        self, texts: str | Sequence[str], *, truncate: bool = False, progress: bool = True
    ) -> NDArray[np.float32]:
        """The embeddings of one text or many, in order: float32 [texts, dimensions].

        Of an encoder that is this LLM's model, or its `embedding_model`. `truncate` cuts texts that are longer than it
        reads; without, they raise RequestError, as does a model that scores.
        """
        encoder = self._need_encoder("embed")
        return self._vectors(encoder, [texts] if isinstance(texts, str) else list(texts), truncate, progress)

    def score(
        self, query: str, documents: str | Sequence[str], *, truncate: bool = False, progress: bool = True
    ) -> NDArray[np.float32]:
        """How well documents answer a query, by a cross-encoder that looks at both together: float32 [documents].

        From 0 to 1, the logistic function of the classifier's logit. Raises RequestError as `embed`, and for a
        classifier of several labels.
        """
        encoder = self._need_encoder("score")
        pairs = [(query, each) for each in ([documents] if isinstance(documents, str) else documents)]
        logits = self._vectors(encoder, pairs, truncate, progress)
        if logits.shape[1] != 1:
            raise RequestError(f"{self.name} sorts into {logits.shape[1]} classes, it scores nothing.", param="model")
        scores: NDArray[np.float32] = np.float32(1) / (np.float32(1) + np.exp(-logits[:, 0]))
        return scores

    def close(self) -> None:
        """Free the KV memory, the threads and the weights. Idempotent."""
        with interrupts_deferred(), self._lock:
            core, self._core = self._core, None
            self._grammars.close()
            if core is not None:
                self._live.clear()
                core.close()
                self._model.close()
                if self._encoder is not None:
                    self._encoder.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.text.encode(prompt) if isinstance(prompt, str) else list(prompt)

    # Running

    def _complete(
        self, prompts: list[list[int]], sampling: Sampling | None, seed: int, progress: bool
    ) -> list[Completion]:
        sampling = self.default_sampling() if sampling is None else sampling
        streams: list[_Stream] = []
        try:
            self._start(streams, prompts, _one_for_each(sampling, len(prompts)), seed)
            with (
                GenerationBar(streams, self._open_core().max_model_len)
                if progress and streams
                else nullcontext() as bar
            ):
                waiting = streams
                while waiting:
                    self._step()
                    waiting = [stream for stream in waiting if stream.finish_reason is None]
                    if bar is not None:
                        bar.update(last=not waiting)
            return [stream.completion() for stream in streams]
        finally:
            self._abort([stream.request.request_id for stream in streams])

    def _pieces(self, prompt: list[int], sampling: SamplingParams, seed: int) -> Generator[str, None, None]:
        # Started in here, because a generator that nobody ever asks is closed without running its `finally`.
        streams: list[_Stream] = []
        try:
            self._start(streams, [prompt], [sampling], seed)
            (stream,) = streams
            while True:
                while stream.finish_reason is None and not stream.pieces:
                    self._step()
                # Another call's steps may have brought pieces, and the end, while this iterator was not asked.
                text = "".join(stream.pieces)
                stream.pieces.clear()
                if text:
                    yield text
                elif stream.finish_reason is not None:
                    stream.check()
                    return
        finally:
            self._abort([stream.request.request_id for stream in streams])

    def _start(
        self, streams: list[_Stream], prompts: list[list[int]], sampling: Sequence[SamplingParams], seed: int
    ) -> None:
        """Add a request for each prompt to the engine and to `streams`, which the caller aborts whatever happens."""
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            asked = params.structured_outputs
            request = Request(
                request_id=f"llm-{next(self._serial)}",
                model=self.name,
                prompt_token_ids=prompt,
                sampling=params,
                seed=(seed + index) % 2**64,
                grammar=None if asked is None else self._grammars.compile(asked),
            )
            text = self.text.stream(
                _stop_strings(params),
                params.min_tokens,
                include_stop=params.include_stop_str_in_output,
                skip_special=params.skip_special_tokens,
            )
            stream = _Stream(request, text)
            streams.append(stream)
            with self._engine() as core:
                core.add(request)
                self._live[request.request_id] = stream

    def _need_encoder(self, feature: str) -> EncoderText:
        if self._encoder_text is None:
            raise RequestError(
                f"{self.name} is no encoder: name one as model, or as embedding_model beside it.", param="model"
            )
        if feature not in self._open_core().capabilities().features:
            other = "scores pairs of texts" if feature == "embed" else "embeds texts"
            raise RequestError(f"This encoder {other}: it cannot {feature}.", param="model")
        return self._encoder_text

    def _vectors(
        self, encoder: EncoderText, texts: Sequence[str | tuple[str, str]], truncate: bool, progress: bool
    ) -> NDArray[np.float32]:
        requests: list[str] = []
        try:
            with self._engine() as core:
                info = core.capabilities().encoder
            assert info is not None
            for begin in range(0, len(texts), TEXTS_PER_REQUEST):
                inputs = encoder.encode_texts(
                    texts[begin : begin + TEXTS_PER_REQUEST], truncate=-1 if truncate else None
                )
                request = EmbedRequest(request_id=f"llm-{next(self._serial)}", model=info.model, inputs=inputs)
                with self._engine() as core:
                    requests.append(request.request_id)
                    core.embed(request)
                    self._embedded[request.request_id] = None
            parts = []
            with TextsBar(len(texts)) if progress and requests else nullcontext() as bar:
                for request_id in requests:
                    while (embedded := self._embedded[request_id]) is None:
                        self._step()
                    if embedded.error is not None:
                        raise EngineError(embedded.error)
                    parts.append(np.frombuffer(embedded.data, "<f4").reshape(-1, info.output_size))
                    if bar is not None:
                        bar.update(sum(map(len, parts)))
            return np.concatenate([np.empty((0, info.output_size), np.float32), *parts])
        finally:
            for request_id in requests:
                self._embedded.pop(request_id, None)
            self._abort(requests)

    def _step(self) -> None:
        """One step for everybody."""
        with self._engine() as core:
            self._advance(core)

    def _advance(self, core: EngineCore | EncoderCore) -> None:
        for delta in core.step():
            stream = self._live[delta.request_id]
            stream.receive(delta)
            if stream.finish_reason is not None:
                del self._live[delta.request_id]
                core.abort(delta.request_id)  # a stop string: the engine would go on
        for embedded in core.take_embedded():
            if embedded.request_id in self._embedded:
                self._embedded[embedded.request_id] = embedded

    def _abort(self, request_ids: Iterable[str]) -> None:
        with interrupts_deferred(), self._lock:
            self._dropped += request_ids
            if not self._at_work and self._core is not None:
                with self._engine():
                    pass

    @contextmanager
    def _engine(self) -> Iterator[EngineCore | EncoderCore]:
        """The engine, for this thread alone and without interrupts; at the end it forgets what was dropped."""
        with interrupts_deferred(), self._lock:
            core, self._at_work = self._open_core(), True
            try:
                yield core
            finally:
                while self._dropped:
                    request_id = self._dropped.pop()
                    self._live.pop(request_id, None)
                    core.abort(request_id)
                self._at_work = False

    def _open_core(self) -> EngineCore | EncoderCore:
        if self._core is None:
            raise EngineError("This LLM is closed.")
        return self._core


@dataclass(slots=True, eq=False)
class _Stream:
    """One request's way from tokens to text."""

    request: Request
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    def receive(self, delta: TokenDelta) -> None:
        self.num_cached_tokens, self.error = delta.num_cached_tokens, delta.error
        self.prompt_logprobs += delta.prompt_logprobs
        for index, token in enumerate(delta.token_ids):
            self.token_ids.append(token)
            self.logprobs += delta.logprobs[index : index + 1]
            ends = delta.stop_token_id is not None and token is delta.token_ids[-1]
            if not ends or self.request.sampling.include_stop_str_in_output:
                self._gain(self.detokenizer.push(token))
                if self.detokenizer.stopped:
                    self.finish_reason = FinishReason.STOP
                    return
        if delta.finish_reason is not None:
            self._gain(self.detokenizer.flush())
            self.finish_reason = FinishReason.STOP if self.detokenizer.stopped else delta.finish_reason

    def completion(self) -> Completion:
        """The whole. Raises EngineError if the engine failed the request."""
        self.check()
        assert self.finish_reason is not None
        sampling = self.request.sampling
        return Completion(
            text="".join(self.pieces),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            logprobs=None if sampling.logprobs is None else self.logprobs,
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None, *self.prompt_logprobs],
        )

    def check(self) -> None:
        if self.finish_reason is FinishReason.ERROR:
            raise EngineError(self.error or "The engine failed the request.")
        if self.finish_reason is FinishReason.REFUSED:
            raise RequestError(self.error or "The request leaves nothing to go on with.")

    def _gain(self, text: str) -> None:
        if text:
            self.pieces.append(text)


def _stop_strings(params: SamplingParams) -> tuple[str, ...]:
    if not all(params.stop):
        raise RequestError("stop strings must not be empty.", param="stop")
    return params.stop


def _one_for_each(sampling: Sampling, count: int) -> Sequence[SamplingParams]:
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if len(sampling) != count:
        raise RequestError(
            f"sampling must be one or one for each of {count} prompts, got {len(sampling)}.", param="sampling"
        )
    return sampling


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast("Prompt", prompts)]
    many = list(cast("Sequence[Prompt]", prompts))
    for index, prompt in enumerate(many):
        if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
            raise RequestError(f"prompt {index} must be a string or a list of token ids.", param="prompt")
    return many


def _is_conversation(value: object) -> TypeGuard[Conversation]:
    return isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)


def _as_conversations(conversations: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if _is_conversation(conversations):
        return [conversations]
    return list(cast("Sequence[Conversation]", conversations))
