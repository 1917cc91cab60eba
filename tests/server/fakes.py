"""A scripted engine and a word-level text side: real implementations of the two seams, without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineDeadError
from engine.features import features_of
from engine.request import (
    Capabilities,
    EmbedRequest,
    EncoderInfo,
    EngineStats,
    FinishReason,
    Request,
    TokenDelta,
)
from engine.text.tool_formats import GENERIC, ToolFormat

VOCAB_SIZE = 128
EOS = 0
BOS = 1
MAX_MODEL_LEN = 64

Script = Callable[[Request], Sequence[TokenDelta | BaseException | asyncio.Event]]
"""What the engine does with a request: deltas it gives, errors it raises, events it waits for."""


def say(request: Request, text: str, *, finish: FinishReason | None = FinishReason.STOP) -> list[TokenDelta]:
    """One delta per character, cut to max_tokens, then EOS where the script ends by itself."""
    deltas = [TokenDelta(request_id=request.request_id, position=i, token_ids=[ord(c)]) for i, c in enumerate(text)]
    limit = request.sampling.max_tokens
    if limit is not None and len(deltas) >= limit:
        deltas = deltas[:limit]
        last = deltas.pop()
        return [
            *deltas,
            TokenDelta(
                request_id=last.request_id,
                position=last.position,
                token_ids=last.token_ids,
                finish_reason=FinishReason.LENGTH,
            ),
        ]
    if finish is FinishReason.STOP:
        deltas.append(
            TokenDelta(
                request_id=request.request_id,
                position=len(deltas),
                token_ids=[EOS],
                finish_reason=finish,
                stop_token_id=EOS,
            )
        )
    elif finish is not None:
        deltas.append(TokenDelta(request_id=request.request_id, position=len(deltas), finish_reason=finish))
    return deltas


def lengths(request: EmbedRequest) -> NDArray[np.float32]:
    """Of each text the vector (number of tokens, sum of tokens, 0, 0)."""
    return np.array([[len(text.token_ids), sum(text.token_ids), 0, 0] for text in request.inputs], np.float32)


class FakeEngine:
    """Plays `script` for every request and remembers what it was asked and what was aborted."""

    def __init__(self, script: Script | None = None, *, max_model_len: int = MAX_MODEL_LEN) -> None:
        self.name = "fake"  # of the kind of engine
        self.script: Script = script or (lambda request: say(request, "Hello, world"))
        self.max_model_len = max_model_len
        self.requests: list[Request] = []
        self.running: set[str] = set()
        self.aborted: list[str] = []
        self.idle = asyncio.Event()
        self.idle.set()
        self.may_start: asyncio.Event | None = None
        self.alive = False
        self.ready = False
        self.stopped = False
        self.pid: int | None = None
        self.encoder: EncoderInfo | None = None
        self.embedding: Callable[[EmbedRequest], NDArray[np.float32] | BaseException | asyncio.Event] = lengths
        self.embeddings: list[EmbedRequest] = []
        self.known: dict[str, str] = {}  # more of its capabilities
        self.features = features_of("native", {"generate", "grammar", "logprobs", "prompt_logprobs"})

    async def start(self) -> None:
        if self.may_start is not None:
            await self.may_start.wait()
        self.alive = self.ready = True

    async def embed(self, request: EmbedRequest) -> NDArray[np.float32]:
        self.embeddings.append(request)
        self.running.add(request.request_id)
        self.idle.clear()
        finished = False
        try:
            vectors = self.embedding(request)
            if isinstance(vectors, asyncio.Event):
                await vectors.wait()
                vectors = np.zeros((len(request.inputs), 4), np.float32)
            finished = True
            if isinstance(vectors, BaseException):
                raise vectors
            return vectors
        finally:
            self._leave(request.request_id, finished)

    async def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        self.running.add(request.request_id)
        self.idle.clear()
        finished = False
        try:
            for step in self.script(request):
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                await asyncio.sleep(0)
                finished = step.finish_reason is not None
                yield step
        finally:
            self._leave(request.request_id, finished)

    def _leave(self, request_id: str, finished: bool) -> None:
        if not finished:
            self.aborted.append(request_id)
        self.running.discard(request_id)
        if not self.running:
            self.idle.set()

    def capabilities(self) -> Capabilities:
        if not self.ready:
            raise EngineDeadError("not started")
        return Capabilities(
            engine=self.name,
            model="fake-model",
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
            encoder=self.encoder,
            features=self.features,
            **self.known,  # type: ignore[arg-type]
        )

    async def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.running), num_blocks=7, num_steps=41)

    async def stop(self, drain: float) -> None:
        self.alive = self.ready = False
        self.stopped = True


class FakeStream:
    """Characters as they come; text that may still become a stop string is held back."""

    def __init__(self, stop: Sequence[str], min_tokens: int, include_stop: bool) -> None:
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._held = ""
        self._num_tokens = 0
        self.num_characters = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        self._num_tokens += 1
        self._held += chr(token_id)
        self.num_characters += 1
        if self._num_tokens > self._min_tokens:
            for stop in self._stop:
                if (at := self._held.find(stop)) >= 0:
                    self.stopped = True
                    return self._held[: at + self._include_stop * len(stop)]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def flush(self) -> str:
        given, self._held = self._held, ""
        return given


class FakeText:
    """One token per ASCII character."""

    chats = True

    def __init__(self, tool_format: ToolFormat = GENERIC, *, reasons: bool = False) -> None:
        self.tool_format = tool_format
        self.reasons = reasons
        self.marker_ids: dict[str, int] = {}

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        return [BOS] + [ord(c) % VOCAB_SIZE for message in messages for c in message["content"] or ""]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return ([BOS] if add_special_tokens else []) + [ord(c) % VOCAB_SIZE for c in text]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id > BOS or not skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def begins_reasoning(self, prompt: Sequence[int]) -> bool:
        return self.reasons and prompt[-7:] == [ord(c) for c in "<think>"]

    def stream(
        self,
        stop: Sequence[str],
        min_tokens: int,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        show_markers: bool = False,
    ) -> FakeStream:
        return FakeStream(stop, min_tokens, include_stop)

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [chr(token_id) for token_id in token_ids]

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(ord(c) % VOCAB_SIZE for c in word) for word in words)
