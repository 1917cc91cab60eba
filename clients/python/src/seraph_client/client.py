"""The synchronous client."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from seraph_client import protocol
from seraph_client.errors import APIConnectionError, OverloadedError
from seraph_client.protocol import DEFAULT_BASE_URL, DEFAULT_TIMEOUT, Retries, StreamReader
from seraph_client.types import Answer, Chunk, Messages, Model, Options, Prompt, Usage


class Stream(Iterator[Chunk]):
    """A streamed answer. Closing it, or leaving its `with` block, makes the server stop.

    Iterating raises StreamError for an error that the server reports, APIConnectionError where the answer breaks off.
    """

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._received = response.iter_bytes()
        self._reader = StreamReader()
        self._chunks: deque[Chunk] = deque()
        self._ended = False

    @property
    def id(self) -> str | None:
        """The answer's id, from the first chunk on."""
        return self._reader.id

    @property
    def model(self) -> str | None:
        """The model that answers, from the first chunk on."""
        return self._reader.model

    @property
    def usage(self) -> Usage | None:
        """Tokens of the whole answer, once it has ended."""
        return self._reader.usage

    def __next__(self) -> Chunk:
        reader = self._reader
        while not self._chunks:
            if reader.failure is not None:
                self.close()
                raise reader.failure
            if self._ended:
                raise StopIteration
            try:
                received = next(self._received, None)
            except httpx.RequestError as error:
                reader.fail(protocol.connection_error(error))
                received = None
            if received is None:  # also after [DONE]: a connection whose answer was read to its end can be used again
                self._ended = True
                reader.end()
            else:
                self._chunks.extend(reader.feed(received))
        return self._chunks.popleft()

    def text(self) -> str:
        """The rest of the first choice's text."""
        return "".join(chunk.text for chunk in self if chunk.index == 0)

    def close(self) -> None:
        """End the answer here. What has been received and not been iterated over is lost."""
        self._ended = True
        self._chunks.clear()
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """A Seraph server, synchronously. Safe to use from several threads; each stream belongs to one.

    `model` is what requests ask for that name none; None: the server's first. `transport` and `sleep` are seams for
    tests and proxies.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: httpx.Timeout | float = DEFAULT_TIMEOUT,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = httpx.Client(
            base_url=protocol.normalize_base_url(base_url),
            headers=protocol.headers(api_key),
            timeout=timeout,
            transport=transport,
        )
        self._model = model
        self._retries = Retries() if retries is None else retries
        self._sleep = sleep

    def chat(self, messages: Messages, **options: Unpack[Options]) -> Answer:
        """The assistant's answer to a conversation. Raises SeraphClientError."""
        body = protocol.chat_body(messages, self._model_for(options), options, stream=False)
        return protocol.read_answer(self._request("POST", protocol.CHAT, body))

    def stream_chat(self, messages: Messages, **options: Unpack[Options]) -> Stream:
        """The same, piece by piece. Raises SeraphClientError, here as long as no answer has begun."""
        body = protocol.chat_body(messages, self._model_for(options), options, stream=True)
        return Stream(self._send("POST", protocol.CHAT, body))

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """The continuation of a text or of token ids; of several prompts, one choice each. Raises SeraphClientError."""
        body = protocol.completion_body(prompt, self._model_for(options), options, stream=False)
        return protocol.read_answer(self._request("POST", protocol.COMPLETIONS, body))

    def stream_complete(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """The same, piece by piece. Raises SeraphClientError, here as long as no answer has begun."""
        body = protocol.completion_body(prompt, self._model_for(options), options, stream=True)
        return Stream(self._send("POST", protocol.COMPLETIONS, body))

    def models(self) -> list[Model]:
        """The models that the server offers. Raises SeraphClientError."""
        return protocol.read_models(self._request("GET", protocol.MODELS))

    def is_ready(self) -> bool:
        """Whether the server would take a request now. Raises SeraphClientError for any other trouble than that."""
        try:
            self._request("GET", protocol.READY, retries=Retries(max_retries=0))
        except (OverloadedError, APIConnectionError):
            return False
        return True

    def close(self) -> None:
        """Close all connections, those of streams that are not finished among them."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _model_for(self, options: Options) -> str:
        if "model" in options:
            return options["model"]
        if self._model is None:
            self._model = protocol.first_model(self.models())
        return self._model

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, retries: Retries | None = None
    ) -> httpx.Response:
        """A whole response with a good status."""
        response = self._send(method, path, body, retries=retries)
        try:
            response.read()
        except httpx.RequestError as error:
            raise protocol.connection_error(error) from error
        return response

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, retries: Retries | None = None
    ) -> httpx.Response:
        """A response with a good status, its body not read yet; sends again as `retries` say."""
        retries = self._retries if retries is None else retries
        attempt = 0
        while True:
            failure: httpx.Response | httpx.TransportError
            try:
                failure = self._http.send(self._http.build_request(method, path, json=body), stream=True)
                if failure.is_success:
                    return failure
                failure.read()
            except httpx.TransportError as error:
                failure = error
            delay = retries.delay(attempt, failure)
            if delay is None:
                if isinstance(failure, httpx.Response):
                    raise protocol.status_error(failure)
                raise protocol.connection_error(failure) from failure
            self._sleep(delay)
            attempt += 1
