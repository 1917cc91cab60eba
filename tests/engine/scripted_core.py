"""A core without a model, for tests of the process around it; run as a script it is an engine process.

The token at position p of a request is (sum of the prompt + p) % 1000, one a step for each request. A prompt that
contains one of the ids below makes the step that would produce its fourth token do what the name says; a text that
does, the step that would answer it. The vector of a text is its number of tokens and their sum, one text a step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import struct
import sys
import threading
import time

from engine.config import EngineConfig
from engine.errors import ConfigError, FormatError, RequestError
from engine.process import main
from engine.request import Capabilities, Embedded, EmbedRequest, EngineStats, FinishReason, Request, TokenDelta

KILL, RAISE, HANG = 2001, 2002, 2003
AT_POSITION = 3
STEP_SECONDS = 0.001
VOCAB_SIZE = 3000
BUILT = "the core was built"
"""Logged for debugging."""
CLOSED = "the core was closed"
"""Written to standard error at the end of a clean exit."""

# Models with these names end the start in their own ways.
BAD_CONFIG, BAD_FILE, BUG, CRASH, SLOW = "bad-config", "bad-file", "bug", "crash", "slow"


def expected_tokens(prompt: list[int], num_tokens: int, start: int = 0) -> list[int]:
    return [(sum(prompt) + position) % 1000 for position in range(start, start + num_tokens)]


class ScriptedCore:
    def __init__(self, config: EngineConfig) -> None:
        match config.model:
            case "bad-config":
                raise ConfigError("threads must be fewer, got many.")
            case "bad-file":
                raise FormatError("no magic", path="model.gguf", offset=4)
            case "bug":
                raise ZeroDivisionError("a bug")
            case "crash":
                print("first\nlast words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                threading.Event().wait()
        logging.getLogger("seraph.engine").debug(BUILT)
        self.config = config
        self.requests: dict[str, Request] = {}
        self.num_output: dict[str, int] = {}
        self.texts: dict[str, tuple[EmbedRequest, bytearray]] = {}  # and the vectors of those that are done
        self.embedded: list[Embedded] = []
        self.num_steps = 0
        self.num_checks = 0

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.texts)

    def add(self, request: Request) -> None:
        if not request.prompt_token_ids:
            raise RequestError("The prompt is empty.", param="prompt", code="empty_prompt")
        self.requests[request.request_id] = request
        self.num_output[request.request_id] = len(request.output_token_ids)

    def embed(self, request: EmbedRequest) -> None:
        if not request.inputs:
            raise RequestError("There are no texts.", param="input", code="no_texts")
        self.texts[request.request_id] = request, bytearray()

    def abort(self, request_id: str) -> None:
        self.requests.pop(request_id, None)
        self.texts.pop(request_id, None)

    def take_embedded(self) -> list[Embedded]:
        embedded, self.embedded = self.embedded, []
        return embedded

    def step(self) -> list[TokenDelta]:
        time.sleep(STEP_SECONDS)  # stands for the computation
        self.num_steps += 1
        deltas = []
        for request_id, request in list(self.requests.items()):
            position = self.num_output[request_id]
            if position == AT_POSITION:
                self._misbehave(request.prompt_token_ids)
            self.num_output[request_id] += 1
            done = self.num_output[request_id] == request.sampling.max_tokens
            if done:
                del self.requests[request_id]
            deltas.append(
                TokenDelta(
                    request_id=request_id,
                    position=position,
                    token_ids=expected_tokens(request.prompt_token_ids, 1, position),
                    finish_reason=FinishReason.LENGTH if done else None,
                )
            )
        for request_id, (texts, done_texts) in list(self.texts.items()):
            token_ids = texts.inputs[len(done_texts) // 8].token_ids
            self._misbehave(token_ids)
            done_texts += struct.pack("<ff", len(token_ids), sum(token_ids))
            if len(done_texts) == 8 * len(texts.inputs):
                del self.texts[request_id]
                self.embedded.append(Embedded(request_id=request_id, data=bytes(done_texts)))
        return deltas

    def _misbehave(self, prompt: list[int]) -> None:
        if KILL in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        if RAISE in prompt:
            raise RuntimeError("the step failed")
        if HANG in prompt:
            threading.Event().wait()

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.requests) + len(self.texts), num_steps=self.num_steps)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            engine="scripted", model=self.config.model, max_model_len=4096, vocab_size=VOCAB_SIZE, features=frozenset()
        )

    def check_integrity(self) -> None:
        self.num_checks += 1

    def close(self) -> None:
        print(CLOSED, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(build=lambda config: contextlib.closing(ScriptedCore(config))))
