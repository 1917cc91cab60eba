"""Both clients over a scripted transport and a clock that the test sets: what is sent, when, and how often."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from seraph_client import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    BadRequestError,
    Client,
    ConflictError,
    ModelFailedError,
    OverloadedError,
    PermissionDeniedError,
    RateLimitError,
    Retries,
    ServerError,
    Timeouts,
)
from tests.clients.either import Either, chunks_of, close
from tests.clients.scripted_server import USAGE, chat_events, whole_chat

Step = httpx.Response | Exception


class Script:
    """Answers in turn, each after `seconds` of a clock that only answers and waits move."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.seen: list[httpx.Request] = []
        self.waited: list[float] = []
        self.now = 0.0
        self.seconds = 1.0
        self.oversleeps = 0.0  # that each wait takes longer than it should

    def __call__(self, *steps: Step) -> None:
        self.steps += steps

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        self.now += self.seconds
        step = self.steps.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    def client(self, kind: type[Client] | type[AsyncClient], **options: Any) -> Either:
        transport = httpx.MockTransport(self.answer)
        seams: dict[str, Any] = {"transport": transport, "clock": lambda: self.now}
        keys = {"api_key": "key", "admin_key": "operator"}
        jitterless = Retries(base_delay=2, jitter=lambda: 0.0)
        made: dict[str, Any] = {"model": "m", "retries": jitterless, **keys, **seams, **options}
        if kind is Client:
            return Either(Client("http://h", sleep=self._sleep, **made))
        return Either(AsyncClient("http://h", sleep=self._asleep, **made))

    def _sleep(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds + self.oversleeps

    async def _asleep(self, seconds: float) -> None:
        self._sleep(seconds)

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(request.content) if request.content else None for request in self.seen]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture(params=[Client, AsyncClient])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def client(kind: Any, script: Script) -> AsyncIterator[Either]:
    made = script.client(kind)
    yield made
    await close(made.client)


def ok(body: Any, status: int = 200) -> httpx.Response:
    return httpx.Response(status, json=body)


def trouble(status: int, **headers: str) -> httpx.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": {"message": f"trouble {status}"}}, headers=fields)


def loaded(state: str, **fields: Any) -> dict[str, Any]:
    """A model as /admin/models tells of it."""
    nothing = dict.fromkeys(("kind", "reason", "progress", "host", "pid", "max_model_len"))
    sizes = dict.fromkeys(("weights_bytes", "kv_cache_bytes", "kv_cache_tokens"), 0)
    return {"name": "b", "names": ["b"], "source": "x", "state": state, **nothing, **sizes, **fields}


# Retries


async def test_waits_double(client: Either, script: Script) -> None:
    script(trouble(503), httpx.ConnectError("refused"), ok(whole_chat("ok")))
    assert (await client("chat", "x")).text == "ok"
    assert script.waited == [2, 4]
    assert script.bodies[0] == script.bodies[1] == script.bodies[2]


async def test_the_server_s_word_decides(client: Either, script: Script) -> None:
    script(trouble(500, x_should_retry="true", retry_after="9"), ok(whole_chat("ok")))
    assert (await client("chat", "x")).text == "ok"
    assert script.waited == [9]
    script(trouble(503, x_should_retry="false"))
    with pytest.raises(OverloadedError):
        await client("chat", "x")
    assert script.waited == [9]


@pytest.mark.parametrize("status", [500, 504, None])
async def test_what_would_only_double_the_work_is_not_repeated(
    client: Either, script: Script, status: int | None
) -> None:
    script(httpx.ReadTimeout("slow") if status is None else trouble(status))
    with pytest.raises((ServerError, APITimeoutError)):
        await client("chat", "x")
    assert len(script.seen) == 1


@pytest.mark.parametrize(("name", "arguments"), [("admin.load", ["x"]), ("admin.unload", ["b"])])
async def test_what_changes_the_server_is_not_repeated(
    client: Either, script: Script, name: str, arguments: list[str]
) -> None:
    script(httpx.ReadError("reset"))
    with pytest.raises(APIConnectionError):
        await client(name, *arguments)
    script(trouble(503), httpx.ConnectError("refused"), ok(loaded("starting"), 202))
    assert (await client(name, *arguments)).state == "starting", "the server has not seen the first two"
    assert len(script.seen) == 4


async def test_health_is_asked_once(client: Either, script: Script) -> None:
    script(ok({"status": "starting"}, 503), trouble(503), httpx.ConnectError("refused"), ok({"status": "ready"}))
    assert (await client("health")).status == "starting"
    assert not await client("is_ready")
    assert not await client("is_ready")
    assert await client("is_ready")
    assert script.waited == []


# Time


async def test_a_wait_that_would_outlast_the_call_is_not_begun(kind: Any, script: Script) -> None:
    client = script.client(kind, timeout=6)
    script(trouble(503), trouble(429, retry_after="9"))
    with pytest.raises(RateLimitError):
        await client("chat", "x")
    assert (script.now, script.waited) == (4, [2])
    await close(client.client)


async def test_no_attempt_begins_after_the_call_s_time(kind: Any, script: Script) -> None:
    client = script.client(kind, timeout=6)
    with pytest.raises(APITimeoutError, match="total time"):
        await client("chat", "x", timeout=0)
    assert script.seen == []
    script.oversleeps = 5
    script(trouble(503))
    with pytest.raises(APITimeoutError, match="total time"):
        await client("chat", "x")
    assert len(script.seen) == 1
    await close(client.client)


async def test_each_attempt_gets_what_is_left(kind: Any, script: Script) -> None:
    client = script.client(kind, timeout=Timeouts(connect=50, read=7, total=9))
    script(trouble(503), trouble(503), ok(whole_chat("ok")))
    await client("chat", "x", timeout=Timeouts(connect=50, read=7, total=10))
    given = [request.extensions["timeout"] for request in script.seen]
    assert [(each["connect"], each["read"]) for each in given] == [(10, 7), (7, 7), (2, 2)]
    await close(client.client)


async def test_the_question_for_the_model_is_part_of_the_call(kind: Any, script: Script) -> None:
    client = script.client(kind, model=None, timeout=10)
    script(ok({"data": [{"id": "first"}]}), ok(whole_chat("ok")))
    await client("chat", "x")
    assert [request.extensions["timeout"]["read"] for request in script.seen] == [10, 9]
    await close(client.client)


class Trickle(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body whose every piece takes a second of the script's clock."""

    def __init__(self, script: Script, *pieces: bytes) -> None:
        self._script = script
        self._pieces = pieces
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._script.now += 1
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


async def consume(answer: Any) -> None:
    """Read a stream to its end."""
    async for _ in chunks_of(answer):
        pass


@pytest.mark.parametrize("name", ["chat", "stream_chat"])
async def test_an_answer_that_trickles_ends_with_the_call_s_time(script: Script, name: str) -> None:
    body = Trickle(script, *[b": keep-alive\n\n"] * 9)
    script(httpx.Response(200, headers={"x-request-id": "r"}, stream=body))
    client = script.client(Client, timeout=5)
    with pytest.raises(APITimeoutError, match="total time") as caught:
        await consume(await client(name, "x"))
    assert (script.now, caught.value.request_id, body.closed) == (5, "r", True)
    await close(client.client)


async def test_a_stream_that_is_complete_is_not_late(script: Script) -> None:
    body = Trickle(script, b"".join(chat_events("a", "b")), b"")
    script(httpx.Response(200, stream=body))
    client = script.client(Client, timeout=3)
    assert (await client("stream_chat", "x")).text() == "ab"
    assert script.now == 3
    await close(client.client)


# What is sent


async def test_models_by_kind_are_asked_for_once(kind: Any, script: Script) -> None:
    client = script.client(kind, model=None)
    kinds = {"e": "embed", "g": "generate", "s": "score"}
    listed = ok({"data": [{"id": id, "kind": each} for id, each in kinds.items()]})
    vectors = {"model": "e", "data": [], "usage": USAGE}
    script(
        listed, ok(vectors), ok(vectors), listed, ok(whole_chat("")), listed, ok({"tokens": [1], "max_model_len": 8})
    )
    await client("embed", ["a"])
    await client("embed", ["b"])
    await client("chat", "c")
    assert len(await client("tokenize", "d")) == 1
    assert [body and body["model"] for body in script.bodies] == [None, "e", "e", None, "g", None, "e"]
    await close(client.client)


async def test_texts(client: Either, script: Script) -> None:
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    data = [{"index": i, "score": i / 2} for i in (1, 0)]
    results = [{"index": 1, "relevance_score": 0.9, "document": {"text": "b"}}, {"index": 0, "relevance_score": 0.1}]
    script(ok({"id": "i", "model": "m", "data": data, "usage": usage}))
    assert (await client("score", "q", ["a", "b"])).scores == (0.0, 0.5)
    script(ok({"id": "i", "model": "m", "results": results, "usage": usage}))
    ranking = await client("rerank", "q", ["a", "b"], top_n=2)
    assert [(each.index, each.score, each.document) for each in ranking.results] == [(1, 0.9, "b"), (0, 0.1, None)]
    script(ok({"tokens": [5, 6], "max_model_len": 64}), ok({"prompt": "a"}))
    assert (await client("tokenize", [{"role": "user", "content": "x"}])).ids == (5, 6)
    assert await client("detokenize", (5, 6)) == "a"
    assert script.bodies[-1] == {"model": "m", "tokens": [5, 6]}
    assert {request.headers["authorization"] for request in script.seen} == {"Bearer key"}
    assert script.seen[0].headers["user-agent"].startswith("seraph-client/")


async def test_the_server_of_itself(client: Either, script: Script) -> None:
    script(ok({"version": "1.2"}), ok({"id": "a/b", "max_model_len": 64, "kind": "embed", "state": "ready"}))
    assert await client("version") == "1.2"
    assert (await client("model", "a/b")).kind == "embed"
    assert script.seen[1].url.path == "/v1/models/a/b"


# The operator's


async def test_loading_and_unloading(client: Either, script: Script) -> None:
    progress = {"label": "Fetching x", "done_bytes": 5, "total_bytes": None}
    script(ok(loaded("fetching", progress=progress), 202))
    begun = await client("admin.load", "x", name="b", kv_cache_memory=1 << 20)
    assert (begun.state, begun.progress.done_bytes, begun.progress.total_bytes) == ("fetching", 5, None)
    script(ok(loaded("packing")), ok(loaded("starting")), ok(loaded("ready", pid=7)))
    assert (await client("admin.wait_ready", "b", poll=0.5)).pid == 7
    script(ok({"data": [loaded("ready")], "memory": {"limit_bytes": 10, "promised_bytes": 3}}))
    everything = await client("admin.models")
    assert ([each.name for each in everything.models], everything.memory_promised) == (["b"], 3)
    script(ok(loaded("draining"), 202), ok(loaded("draining")), trouble(404))
    assert (await client("admin.unload", "b", drain=2)).state == "draining"
    await client("admin.wait_gone", "b", poll=3)
    script(httpx.Response(204))
    assert await client("admin.unload", "b") is None
    assert script.waited == [0.5, 0.5, 3]
    assert {request.headers["authorization"] for request in script.seen} == {"Bearer operator"}
    assert [str(request.url) for request in script.seen if request.method == "DELETE"] == [
        "http://h/admin/models/b?drain=2",
        "http://h/admin/models/b",
    ]


async def test_a_model_that_does_not_come(client: Either, script: Script) -> None:
    script(ok(loaded("starting")), ok(loaded("failed", reason="It is no model.")))
    with pytest.raises(ModelFailedError, match="It is no model"):
        await client("admin.wait_ready", "b")
    script(*[ok(loaded("fetching")) for _ in range(4)])
    with pytest.raises(APITimeoutError, match="'b' is still fetching"):
        await client("admin.wait_ready", "b", timeout=10, poll=2)
    script(*[ok(loaded("draining")) for _ in range(4)])
    with pytest.raises(APITimeoutError, match="'b' is still draining"):
        await client("admin.wait_gone", "b", timeout=10, poll=2)


@pytest.mark.parametrize(
    ("status", "error"), [(403, PermissionDeniedError), (409, ConflictError), (400, BadRequestError)]
)
async def test_what_the_operator_is_refused(
    client: Either, script: Script, status: int, error: type[Exception]
) -> None:
    script(trouble(status))
    with pytest.raises(error):
        await client("admin.load", "x")
