"""`seraph chat`: a conversation in the terminal, with a running server or with an engine of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from engine import logs
from engine.backends.base import Engine
from engine.backends.native import NativeEngine
from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError, ContextLengthError, EngineError, RequestError, SeraphError, UnsupportedModelError
from engine.request import FinishReason, Request, SamplingParams
from server.launching import fetch
from server.settings import Settings

if TYPE_CHECKING:
    import httpx

    from server.generation import Text

Messages = list[dict[str, str]]

TEMPERATURE = 0.7
"""Of an engine of our own, where neither the user nor the generation config names one."""

HELP = "/exit or Ctrl-D ends, /clear begins anew, Ctrl-C interrupts an answer."


class Partner(Protocol):
    """Who answers."""

    def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        """The answer's text as it comes. Raises SeraphError. Closing it stops the answer."""
        ...


class LocalPartner:
    """An engine of our own."""

    def __init__(self, engine: Engine, text: Text, sampling: SamplingParams) -> None:
        self._engine = engine
        self._text = text
        self._sampling = sampling

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        known = self._engine.capabilities()
        prompt = self._text.encode_chat(messages)
        room = known.max_model_len - len(prompt)
        if room < 1:
            raise ContextLengthError(max_model_len=known.max_model_len, num_tokens=len(prompt))
        request = Request(
            request_id=f"chat-{uuid.uuid4().hex}",
            model=known.model,
            prompt_token_ids=prompt,
            sampling=msgspec.structs.replace(self._sampling, max_tokens=min(self._sampling.max_tokens or room, room)),
            seed=secrets.randbits(64),
        )
        stream = self._text.stream((), 0)
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if delta.finish_reason is FinishReason.ERROR:
                    raise EngineError(delta.error or "the engine gave no reason")
                shown = delta.token_ids if delta.stop_token_id is None else delta.token_ids[:-1]
                text = "".join([stream.push(token_id) for token_id in shown])
                yield text + stream.flush() if delta.finish_reason is not None else text


class RemotePartner:
    """A server that speaks the OpenAI API. `sampling` are fields of its requests; the server knows the others."""

    def __init__(self, client: httpx.AsyncClient, model: str, sampling: Mapping[str, float]) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        import httpx

        body: dict[str, Any] = {"messages": messages, "stream": True, **self._sampling}
        try:
            body["model"] = self._model = self._model or await self._first_model()
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise _as_error(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise EngineError(event["error"]["message"])
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        except httpx.HTTPError as error:
            raise EngineError(f"{self._client.base_url} does not answer: {error or type(error).__name__}.") from None

    async def _first_model(self) -> str:
        response = await self._client.get("/v1/models")
        if response.status_code != 200:
            raise _as_error(response.status_code, response.content)
        models = [model for model in response.json()["data"] if model.get("kind", "generate") == "generate"]
        if not models:
            raise RequestError(f"{self._client.base_url} has no model to talk to.")
        return str(models[0]["id"])


def _as_error(status: int, body: bytes) -> SeraphError:
    try:
        return RequestError(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return EngineError(f"the server answered with status {status}.")


@dataclass(slots=True)
class Conversation:
    """The history, and one turn at a time. `write` and `read` are the terminal."""

    partner: Partner
    system: str = ""
    read: Callable[[str], str] = input
    write: Callable[[str], object] = sys.stdout.write
    messages: Messages = field(default_factory=list)

    def run(self, runner: asyncio.Runner) -> None:
        """Until the user ends it."""
        self.clear()
        self.write(HELP + "\n")
        while True:
            try:
                line = self.read("\n> ").strip()
            except EOFError:
                self.write("\n")
                return
            match line:
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case "/clear":
                    self.clear()
                case "/help":
                    self.write(HELP + "\n")
                case _:
                    self._turn(runner, line)

    def clear(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def _turn(self, runner: asyncio.Runner, line: str) -> None:
        self.messages.append({"role": "user", "content": line})
        parts: list[str] = []
        try:
            runner.run(self._show(parts))
        except KeyboardInterrupt:
            self.write(" [interrupted]")
        except SeraphError as error:
            self.write(f"error: {error}\n")
        if parts:  # what was said stays said, also where it was cut short
            self.messages.append({"role": "assistant", "content": "".join(parts)})
            self.write("\n")
        else:
            self.messages.pop()

    async def _show(self, parts: list[str]) -> None:
        async with aclosing(self.partner.answer(list(self.messages))) as pieces:
            async for piece in pieces:
                if piece:
                    parts.append(piece)
                    self.write(piece)
                    sys.stdout.flush()


def chat(settings: Settings, *, url: str, asked: Mapping[str, float], system: str) -> None:
    """Talk until the user ends it: to the server at `url`, or, where it is empty, to an engine started for this.

    `asked` are the sampling fields that the user gave, by the API's names. Raises RequestError where they cannot
    be, and ConfigError for more than one model.
    """
    if len(settings.model) != 1:
        raise ConfigError(f"A chat is with one model, got {', '.join(settings.model)}.")
    (source,) = settings.model
    SamplingParams.from_defaults(asked)
    logs.configure(settings.log_level, settings.log_format)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()

    with asyncio.Runner() as runner:
        if url:
            import httpx

            headers = {"authorization": f"Bearer {settings.api_key[0]}"} if settings.api_key else {}
            timeout = httpx.Timeout(10.0, read=600.0)
            # A terminal on this machine speaks to the server it names, not to a proxy that the environment names.
            client = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=timeout, trust_env=False)
            try:
                partner = RemotePartner(client, "" if source == DEFAULT_MODEL else source, asked)
                Conversation(partner, system).run(runner)
            finally:
                runner.run(client.aclose())
            return
        config, stated = settings.engine_config(source), settings.generation_defaults()
        model = fetch(config)
        defaults = model.info.generation_defaults if stated is None else stated
        sampling = SamplingParams.from_defaults({"temperature": TEMPERATURE, **defaults, **asked})
        engine = NativeEngine(config)
        engine.launch()
        try:
            from engine.text import ModelText

            text = ModelText.from_info(model.info, chat_template=settings.chat_template_source())
            if not text.chats:
                raise UnsupportedModelError(
                    f"a chat needs a chat template, and {model.name} has none: give one with --chat-template, or have "
                    "text continued through /v1/completions of `seraph serve`."
                )
            model.close()
            runner.run(engine.start())
            try:
                Conversation(LocalPartner(engine, text, sampling), system).run(runner)
            finally:
                runner.run(engine.stop(drain=0.0))
        finally:
            engine.kill()
