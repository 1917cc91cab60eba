"""The asynchronous client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import count
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from seraph_client import protocol
from seraph_client.errors import APIConnectionError, NotFoundError, OverloadedError
from seraph_client.options import (
    CallOptions,
    ChatOptions,
    CompletionOptions,
    EmbedOptions,
    Messages,
    ModelOptions,
    Prompt,
    TextOptions,
    Texts,
    TokenizeOptions,
)
from seraph_client.protocol import DEFAULT_BASE_URL, DEFAULT_TIMEOUTS, EMBED, GENERATE, SCORE, Call
from seraph_client.reader import StreamFacts, StreamReader
from seraph_client.retries import Deadline, Retries, Timeouts
from seraph_client.types import (
    Answer,
    Chunk,
    Embeddings,
    Health,
    LoadedModel,
    LoadedModels,
    Model,
    Ranking,
    Scores,
    Tokens,
)

T = TypeVar("T")


class AsyncStream(StreamFacts, AsyncIterator[Chunk]):
    """A streamed answer. Closing it, or leaving its `async with` block, makes the server stop.

    Iterating raises StreamError for an error that the server reports, APIConnectionError where the answer breaks off.
    """

    def __init__(self, response: httpx.Response, deadline: Deadline) -> None:
        self._response = response
        self._deadline = deadline
        self._received = response.aiter_bytes()
        self._reader = StreamReader(response.headers.get("x-request-id"))

    async def __anext__(self) -> Chunk:
        while (chunk := self._reader.take()) is None:
            if self._reader.has_ended:
                raise StopAsyncIteration
            await self._receive()
        return chunk

    async def text(self) -> str:
        """The rest of the first choice's text."""
        return "".join([chunk.text async for chunk in self if chunk.index == 0])

    async def answer(self) -> Answer:
        """The whole answer, what has been iterated over included, once its rest has come."""
        async for _ in self:
            pass
        return self._reader.answer()

    async def close(self) -> None:
        """End the answer here. What has been received and not been iterated over is lost."""
        self._reader.drop()
        await self._response.aclose()

    async def _receive(self) -> None:
        reader = self._reader
        try:
            async with asyncio.timeout(self._deadline.remaining()):
                received = await anext(self._received, None)
        except TimeoutError:
            reader.fail(protocol.deadline_error(reader.request_id))
        except httpx.RequestError as error:
            reader.fail(protocol.connection_error(error, reader.request_id))
        else:
            reader.feed(received) if received is not None else reader.end()
        if reader.has_ended:
            await self._response.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class AsyncClient:
    """A Seraph server, asynchronously. Belongs to one event loop; cancelling a call closes its connection.

    `model` is what requests ask for that name none; None: the server's first of the kind that they need. `api_key`
    opens the API, `admin_key` what `admin` does. A `timeout` that is a number is each call's whole time. `transport`,
    `sleep` and `clock` are seams for tests and proxies. Every call raises SeraphClientError.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        admin_key: str | None = None,
        model: str | None = None,
        timeout: Timeouts | float = DEFAULT_TIMEOUTS,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=protocol.normalize_base_url(base_url), transport=transport)
        self._headers = {False: protocol.headers(api_key), True: protocol.headers(admin_key)}  # by who asks
        self._model = model
        self._models: dict[str | None, str] = {}  # kind -> the server's first of it
        self._timeouts = protocol.as_timeouts(timeout)
        self._retries = Retries() if retries is None else retries
        self._sleep = sleep
        self._clock = clock
        self.admin = AsyncAdmin(self)

    # Generation

    async def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Answer:
        """The assistant's answer to a conversation."""
        deadline = self._deadline(options)
        model = await self._model_for(GENERATE, options, deadline)
        return await self._whole(protocol.chat(messages, model, options), deadline)

    async def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncStream:
        """The same, piece by piece. Raises here as long as no answer has begun."""
        deadline = self._deadline(options)
        model = await self._model_for(GENERATE, options, deadline)
        return AsyncStream(await self._send(protocol.chat(messages, model, options, stream=True), deadline), deadline)

    async def complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> Answer:
        """The continuation of a text or of token ids; of several prompts, `n` choices each."""
        deadline = self._deadline(options)
        model = await self._model_for(GENERATE, options, deadline)
        return await self._whole(protocol.complete(prompt, model, options), deadline)

    async def stream_complete(self, prompt: Prompt, **options: Unpack[CompletionOptions]) -> AsyncStream:
        """The same, piece by piece. Raises here as long as no answer has begun."""
        deadline = self._deadline(options)
        model = await self._model_for(GENERATE, options, deadline)
        return AsyncStream(await self._send(protocol.complete(prompt, model, options, stream=True), deadline), deadline)

    # Texts

    async def embed(self, texts: Prompt, **options: Unpack[EmbedOptions]) -> Embeddings:
        """A vector for each text, or for each list of token ids."""
        deadline = self._deadline(options)
        model = await self._model_for(EMBED, options, deadline)
        return await self._whole(protocol.embed(texts, model, options), deadline)

    async def score(self, text_1: Texts, text_2: Texts, **options: Unpack[TextOptions]) -> Scores:
        """How well the texts of each pair go together: one text with each of many, or many with as many."""
        deadline = self._deadline(options)
        model = await self._model_for(SCORE, options, deadline)
        return await self._whole(protocol.score(text_1, text_2, model, options), deadline)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_n: int | None = None,
        return_documents: bool = True,
        **options: Unpack[TextOptions],
    ) -> Ranking:
        """Documents by how well they answer a query, the best first."""
        deadline = self._deadline(options)
        model = await self._model_for(SCORE, options, deadline)
        call = protocol.rerank(query, documents, model, options, top_n=top_n, return_documents=return_documents)
        return await self._whole(call, deadline)

    async def tokenize(self, text: Messages, **options: Unpack[TokenizeOptions]) -> Tokens:
        """The token ids of a text, or of a conversation as the model gets to read it."""
        deadline = self._deadline(options)
        model = await self._model_for(None, options, deadline)
        return await self._whole(protocol.tokenize(text, model, options), deadline)

    async def detokenize(self, tokens: Sequence[int], **options: Unpack[ModelOptions]) -> str:
        """The text of token ids."""
        deadline = self._deadline(options)
        model = await self._model_for(None, options, deadline)
        return await self._whole(protocol.detokenize(tokens, model, options), deadline)

    # The server

    async def models(self, **options: Unpack[CallOptions]) -> list[Model]:
        """The models that the server offers."""
        return await self._whole(protocol.MODELS, self._deadline(options))

    async def model(self, id: str, **options: Unpack[CallOptions]) -> Model:
        """One of them. Raises NotFoundError."""
        return await self._whole(protocol.model(id), self._deadline(options))

    async def version(self, **options: Unpack[CallOptions]) -> str:
        """The server's version."""
        return await self._whole(protocol.VERSION_OF_SERVER, self._deadline(options))

    async def health(self, **options: Unpack[CallOptions]) -> Health:
        """What the server says of itself; asked once, without retries."""
        return await self._whole(protocol.HEALTH, self._deadline(options))

    async def is_ready(self, **options: Unpack[CallOptions]) -> bool:
        """Whether the server would take a request now. Raises SeraphClientError for any other trouble than that."""
        try:
            return (await self.health(**options)).is_ready
        except (OverloadedError, APIConnectionError):
            return False

    async def close(self) -> None:
        """Close all connections, those of streams that are not finished among them."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # Sending

    def _deadline(self, options: CallOptions) -> Deadline:
        timeout = options.get("timeout")
        return Deadline(self._timeouts if timeout is None else protocol.as_timeouts(timeout), self._clock)

    async def _model_for(self, kind: str | None, options: ModelOptions, deadline: Deadline) -> str:
        if (named := options.get("model", self._model)) is not None:
            return named
        if kind not in self._models:
            models = await self._whole(protocol.MODELS, deadline)
            self._models[kind] = protocol.first_of_kind(models, kind)
        return self._models[kind]

    async def _whole(self, call: Call[T], deadline: Deadline) -> T:
        """A call's answer, read to its end."""
        response = await self._send(call, deadline)
        received = bytearray()
        async with aclosing(response):
            try:
                async with asyncio.timeout(deadline.remaining()):
                    async for piece in response.aiter_bytes():
                        received += piece
            except TimeoutError:
                raise protocol.deadline_error(response.headers.get("x-request-id")) from None
            except httpx.RequestError as error:
                raise protocol.connection_error(error, response.headers.get("x-request-id")) from error
        return call.read(protocol.reply(response, bytes(received)))

    async def _send(self, call: Call[T], deadline: Deadline) -> httpx.Response:
        """A response that is an answer, its body not read yet; sends again as the retries say."""
        retries = call.retries or self._retries
        for attempt in count():
            failure: httpx.Response | httpx.TransportError
            try:
                async with asyncio.timeout(deadline.remaining()):
                    failure = await self._http.send(self._request(call, deadline), stream=True)
                    if call.is_answer(failure):
                        return failure
                    await failure.aread()
            except TimeoutError:
                raise protocol.deadline_error() from None
            except httpx.TransportError as error:
                failure = error
            delay = retries.delay(attempt, failure, repeatable=call.repeatable)
            if delay is None or not deadline.allows(delay):
                raise protocol.failure_error(failure)
            await self._sleep(delay)
        raise AssertionError("count() ends")

    def _request(self, call: Call[T], deadline: Deadline) -> httpx.Request:
        return self._http.build_request(
            call.method,
            call.path,
            json=call.body,
            params=call.params,
            headers=self._headers[call.by_operator],
            timeout=protocol.timeout_of(deadline),
        )


class AsyncAdmin:
    """The operator's calls: models that come and go while the server runs. They need `admin_key`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def models(self) -> LoadedModels:
        """Every model: served, on its way in or out, or failed to load; and the memory."""
        return await self._ask(protocol.LOADED_MODELS)

    async def model(self, name: str) -> LoadedModel:
        """One of them. Raises NotFoundError."""
        return await self._ask(protocol.loaded_model(name))

    async def load(
        self, source: str, *, name: str | None = None, kv_cache_memory: str | int | None = None
    ) -> LoadedModel:
        """Begin to load a model; `wait_ready` waits for its end. `kv_cache_memory`: "2GiB", "10%", or bytes."""
        return await self._ask(protocol.load(source, name=name, kv_cache_memory=kv_cache_memory))

    async def unload(self, name: str, *, drain: float | None = None) -> LoadedModel | None:
        """Begin to unload a model; `wait_gone` waits for its end. None: it is gone already.

        Requests that run have `drain` seconds, then they are cut off. A load under way is given up.
        """
        return await self._ask(protocol.unload(name, drain=drain))

    async def wait_ready(self, name: str, *, timeout: float = 600.0, poll: float = 0.25) -> LoadedModel:
        """Ask until a model is ready. Raises ModelFailedError where it will not be, APITimeoutError, NotFoundError."""
        deadline = Deadline(Timeouts(total=timeout), self._client._clock)
        while not protocol.is_ready(model := await self.model(name)):
            if not deadline.allows(poll):
                raise protocol.still(model)
            await self._client._sleep(poll)
        return model

    async def wait_gone(self, name: str, *, timeout: float = 600.0, poll: float = 0.25) -> None:
        """Ask until a model is gone. Raises APITimeoutError."""
        deadline = Deadline(Timeouts(total=timeout), self._client._clock)
        while True:
            try:
                model = await self.model(name)
            except NotFoundError:
                return
            if not deadline.allows(poll):
                raise protocol.still(model)
            await self._client._sleep(poll)

    async def _ask(self, call: Call[T]) -> T:
        return await self._client._whole(call, self._client._deadline({}))
