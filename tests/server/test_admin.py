"""/admin/models over scripted engines: who may come in, what may be asked, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.backends.packing import Work
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.errors import EngineError, SourceError
from engine.request import Capabilities
from server.app import create_app
from server.kinds import Kind
from server.loading import MAX_FAILED, Loader
from server.registry import ServedModel
from server.routes.service import Service
from server.settings import Settings
from tests.server.fakes import FakeEngine, FakeText
from tests.server.support import Client, chat, client_for, served, settings, wait_until
from tests.tiny_gguf import write_tiny_llama

ADMIN = "/admin/models"
KEY = {"authorization": "Bearer the-key"}
GIB = 1 << 30


class Drained(FakeEngine):
    """Stops when it is told to, or at once where nothing may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_drain: list[float] = []
        self.may_stop = asyncio.Event()

    async def start(self) -> None:
        await super().start()
        self.pid = 4711

    def capabilities(self) -> Capabilities:
        return Capabilities(
            engine="fake", model="m", max_model_len=64, vocab_size=128, kv_cache_bytes=GIB, kv_cache_tokens=640
        )

    async def stop(self, drain: float) -> None:
        self.asked_drain.append(drain)
        if drain and self.ready:
            await self.may_stop.wait()
        await super().stop(drain)


@dataclass
class House:
    """A server with one model, "m", and all that its loads are made of."""

    client: Client
    service: Service
    folder: Path
    first: Drained
    configs: list[EngineConfig] = field(default_factory=list)
    engines: list[Drained] = field(default_factory=list)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None
    report: Callable[[Work], None] = lambda work: None

    async def prepare(self, config: EngineConfig, report: Callable[[Work], None]) -> None:
        self.configs.append(config)
        self.report = report
        await self.may_go_on.wait()
        if self.failure is not None:
            raise self.failure

    def engine(self, config: EngineConfig) -> Drained:
        self.configs.append(config)
        self.engines.append(Drained())
        return self.engines[-1]

    def file(self, name: str = "new.gguf") -> str:
        write_tiny_llama(self.folder / name)
        return str(self.folder / name)

    async def load(self, model: str | None = None, **body: Any) -> httpx.Response:
        return await self.client.post(ADMIN, headers=KEY, json={"model": model or self.file(), **body})

    async def unload(self, name: str, **query: Any) -> httpx.Response:
        return await self.client.delete(f"{ADMIN}/{name}", headers=KEY, params=query)

    async def state(self, name: str = "new") -> str | None:
        await asyncio.sleep(0.005)  # asking is all done in one go, and lets nothing else run
        response = await self.client.get(f"{ADMIN}/{name}", headers=KEY)
        return str(response.json()["state"]) if response.status_code == 200 else None

    async def until(self, state: str | None, name: str = "new") -> None:
        async with asyncio.timeout(20):
            while await self.state(name) != state:
                pass


@asynccontextmanager
async def housing(folder: Path, *, memory: int = 4 * GIB, remote: bool = True, **changes: Any) -> AsyncIterator[House]:
    configured = settings(admin_key=("the-key", "another"), allow_remote_load=remote, **changes)
    first = Drained()
    house: House

    async def prepare(config: EngineConfig, report: Callable[[Work], None]) -> None:
        await house.prepare(config, report)

    app = create_app(
        configured,
        [served(first, configured)],
        make_loader=partial(
            Loader, prepare=prepare, make_engine=lambda config: house.engine(config), memory=lambda: memory
        ),
    )
    async with app.router.lifespan_context(app):
        service: Service = app.state.service
        await wait_until(lambda: service.started)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            house = House(client, service, folder, first)
            yield house
    assert all(not engine.alive for engine in (first, *house.engines))
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith(("load-", "unload-"))] == []


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SERAPH_HOME", str(tmp_path / "home"))
    return tmp_path


# Who may come in


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer api-key"}, {"x-api-key": "the-ke"}])
@pytest.mark.parametrize(
    ("method", "path"), [("GET", ADMIN), ("POST", ADMIN), ("DELETE", ADMIN + "/m"), ("GET", "/admin")]
)
async def test_only_its_own_key_opens_it(method: str, path: str, headers: dict[str, str]) -> None:
    engine = FakeEngine()
    async with client_for(engine, settings(api_key=("api-key",), admin_key=("the-key",))) as client:
        response = await client.request(method, path, headers=headers, json={"model": DEFAULT_MODEL})
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await client.get(ADMIN, headers=KEY)).status_code == 200
        assert (await client.get("/v1/models", headers=KEY)).status_code == 401  # and it opens nothing else
        assert engine.ready


@pytest.mark.parametrize("headers", [{}, KEY])
async def test_without_a_key_it_is_closed(headers: dict[str, str]) -> None:
    async with client_for(FakeEngine()) as client:
        for method, path in (("GET", ADMIN), ("POST", ADMIN), ("DELETE", ADMIN + "/m")):
            response = await client.request(method, path, headers=headers, json={"model": DEFAULT_MODEL})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_closed")
            assert "--admin-key" in response.json()["error"]["message"]


# What may be asked


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"[]", 400, "invalid_json", None),
        ({}, 400, "missing_required_parameter", "model"),
        ({"model": ""}, 400, "invalid_value", "model"),
        ({"model": 7}, 400, "invalid_value", "model"),
        ({"model": "x" * 5000}, 400, "invalid_value", "model"),
        ({"model": "no-such-thing"}, 400, "unknown_source", "model"),
        ({"model": "hf:what"}, 400, "unknown_source", "model"),
        ({"model": DEFAULT_MODEL, "name": "a\nb"}, 400, "invalid_value", "name"),
        ({"model": DEFAULT_MODEL, "name": ""}, 400, "invalid_value", "name"),
        ({"model": DEFAULT_MODEL, "kv_cache_memory": "lots"}, 400, "invalid_value", "kv_cache_memory"),
        ({"model": DEFAULT_MODEL, "kv_cache_memory": 0}, 400, "invalid_value", "kv_cache_memory"),
        ({"model": DEFAULT_MODEL, "kv_cache_memory": True}, 400, "invalid_value", "kv_cache_memory"),
        ({"model": DEFAULT_MODEL, "kv_cache_memroy": "1GB"}, 400, "unknown_parameter", "kv_cache_memroy"),
        ({"model": DEFAULT_MODEL, "name": "m"}, 409, "model_exists", "model"),
    ],
)
async def test_a_wrong_request(home: Path, body: Any, status: int, code: str, param: str | None) -> None:
    async with housing(home) as house:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        response = await house.client.post(ADMIN, headers=KEY | {"content-type": "application/json"}, **content)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, code, param), error
        assert house.configs == [] and house.service.loader.loads == []


@pytest.mark.parametrize("model", ["./new.gguf", "/etc", "hf:org/name", "pypi:x==1/y.gguf", "no-such-thing"])
async def test_only_the_catalogue_unless_allowed(home: Path, model: str) -> None:
    async with housing(home, remote=False) as house:
        response = await house.load(model)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "remote_load_not_allowed")
        assert (await house.load(DEFAULT_MODEL)).status_code == 202
        assert (await house.state(DEFAULT_MODEL)) == "fetching"


@pytest.mark.parametrize("drain", ["-1", "nan", "inf", "soon", "1e9"])
async def test_a_wrong_drain(home: Path, drain: str) -> None:
    async with housing(home) as house:
        response = await house.unload("m", drain=drain)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "drain")
        assert await house.state("m") == "ready"


async def test_what_is_not_there(home: Path) -> None:
    async with housing(home) as house:
        for response in (await house.unload("x"), await house.client.get(f"{ADMIN}/x", headers=KEY)):
            assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_not_before_the_start_has_ended() -> None:
    engine = FakeEngine()
    engine.may_start = asyncio.Event()
    configured = settings(admin_key=("the-key",))
    app = create_app(configured, [served(engine, configured)])
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        assert (await client.post(ADMIN, headers=KEY, json={"model": DEFAULT_MODEL})).status_code == 503
        response = await client.delete(f"{ADMIN}/m", headers=KEY)
        assert (response.status_code, response.json()["error"]["code"]) == (409, "model_busy")
        assert (await client.get(f"{ADMIN}/m", headers=KEY)).json()["state"] == "starting"


# What becomes of it


async def test_a_model_comes_and_goes(home: Path) -> None:
    async with housing(home) as house:
        response = await house.load(kv_cache_memory="25%")
        assert response.status_code == 202
        assert (response.json()["name"], response.json()["state"]) == ("new", "fetching")
        await wait_until(lambda: bool(house.configs))
        house.report(Work("Fetching new", 10, 100))
        told = (await house.client.get(f"{ADMIN}/new", headers=KEY)).json()
        assert told["progress"] == {"label": "Fetching new", "done_bytes": 10, "total_bytes": 100}
        house.report(Work("Packing new", 0, 100))
        assert await house.state() == "packing"
        asked = await house.client.post("/v1/chat/completions", json=chat(model="new"))
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "not_ready")
        assert "is being loaded (packing)" in asked.json()["error"]["message"]
        assert (await house.client.get("/health")).status_code == 200  # it is not one of those that must be ready

        house.may_go_on.set()
        await house.until("ready")
        tokens = house.configs[-1].kv_cache_tokens
        assert tokens is not None and house.configs[-1].kv_cache_memory is None
        told = (await house.client.get(ADMIN, headers=KEY)).json()
        assert [one["name"] for one in told["data"]] == ["m", "new"]
        assert told["data"][1] | {"source": ""} == {
            "object": "model",
            "name": "new",
            "names": ["new"],
            "source": "",
            "kind": "generate",
            "state": "ready",
            "reason": None,
            "progress": None,
            "host": None,
            "pid": 4711,
            "weights_bytes": told["data"][1]["weights_bytes"],
            "kv_cache_bytes": GIB,
            "kv_cache_tokens": 640,
            "max_model_len": 64,
        }
        assert told["data"][1]["weights_bytes"] > 1000
        assert told["memory"] == {
            "limit_bytes": 4 * GIB,
            "promised_bytes": 2 * GIB + told["data"][1]["weights_bytes"],
        }
        assert [one["id"] for one in (await house.client.get("/v1/models")).json()["data"]] == ["m", "new"]
        answer = await house.client.post("/v1/chat/completions", json=chat(model="new"))
        assert answer.json()["model"] == "new"
        assert len(house.engines[0].requests) == 1 and house.first.requests == []

        assert (await house.unload("new", drain=7)).json()["state"] == "draining"
        refused = await house.client.post("/v1/chat/completions", json=chat(model="new"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert (await house.client.get("/health")).json() == {"status": "ready"}
        again = await house.unload("new")
        assert (again.status_code, again.json()["error"]["code"]) == (409, "model_busy")
        house.engines[0].may_stop.set()
        await house.until(None)
        assert house.engines[0].asked_drain == [7.0]
        assert (await house.client.post("/v1/chat/completions", json=chat(model="new"))).status_code == 404
        metrics = (await house.client.get("/metrics")).text
        assert 'seraph_sequences{model="m"}' in metrics and 'seraph_sequences{model="new"}' not in metrics


async def test_two_loads_of_one_model(home: Path) -> None:
    async with housing(home) as house:
        assert (await house.load(kv_cache_memory=1 << 20)).status_code == 202
        response = await house.load()
        assert (response.status_code, response.json()["error"]["code"]) == (409, "model_busy")
        assert (await house.load(name="other")).status_code == 202  # under a name of its own it is another
        house.may_go_on.set()
        await house.until("ready")
        await house.until("ready", "other")
        response = await house.load()
        assert (response.status_code, response.json()["error"]["code"]) == (409, "model_exists")


async def test_a_load_that_is_given_up(home: Path) -> None:
    async with housing(home) as house:
        await house.load()
        response = await house.unload("new")
        assert (response.status_code, response.json()["state"]) == (202, "cancelled")
        await house.until(None)
        assert house.engines == []
        assert (await house.load()).status_code == 202


@pytest.mark.parametrize("failure", [SourceError("no such wheel"), EngineError("killed"), RuntimeError("odd")])
async def test_a_load_that_fails(home: Path, failure: Exception) -> None:
    async with housing(home) as house:
        house.failure = failure
        house.may_go_on.set()
        await house.load()
        await house.until("failed")
        told = (await house.client.get(f"{ADMIN}/new", headers=KEY)).json()
        assert (told["reason"], told["pid"], told["weights_bytes"]) == (str(failure), None, 0)
        assert (await house.client.get("/health")).status_code == 200
        assert (await house.client.post("/v1/chat/completions", json=chat(model="new"))).status_code == 404
        assert (await house.unload("new")).status_code == 204
        assert await house.state() is None
        await house.load()
        await house.until("failed")
        house.failure = None
        assert (await house.load()).status_code == 202  # tried again
        await house.until("ready")


async def test_an_engine_that_does_not_start_is_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: Drained) -> None:
        raise EngineError("it crashed")

    async with housing(home) as house:
        monkeypatch.setattr(Drained, "start", start)
        house.may_go_on.set()
        await house.load()
        await house.until("failed")
        assert house.engines[0].stopped


@pytest.mark.parametrize(
    ("memory", "body", "said"),
    [
        (4 * GIB, {"kv_cache_memory": "3.5GiB"}, "The KV memory must be at most"),
        (4 * GIB, {"kv_cache_memory": "100%"}, "The KV memory must be at most"),
        (4 * GIB, {"kv_cache_memory": "5GiB"}, "kv_cache_memory must be at most"),
        (GIB, {}, "The weights of"),
    ],
)
async def test_memory_that_does_not_suffice(home: Path, memory: int, body: dict[str, Any], said: str) -> None:
    async with housing(home, memory=memory) as house:
        house.may_go_on.set()
        await house.load(**body)
        await house.until("failed")
        assert said in (await house.client.get(f"{ADMIN}/new", headers=KEY)).json()["reason"]
        assert house.engines == []


async def test_the_memory_of_the_start_is_not_given_twice(home: Path) -> None:
    """--kv-cache-memory was for the models of the start; --kv-cache-tokens is of each model."""
    async with housing(home, kv_cache_memory="3.9GiB") as house:
        house.may_go_on.set()
        await house.load()
        await house.until("ready")
    async with housing(home, kv_cache_tokens=4096) as house:
        house.may_go_on.set()
        await house.load()
        await house.until("ready")
        assert house.configs[-1].kv_cache_tokens == 4096


async def test_the_last_model_may_go(home: Path) -> None:
    async with housing(home) as house:
        await house.unload("m", drain=0)
        await house.until(None, "m")
        for path, status in (("/health", 503), ("/health/ready", 503), ("/health/live", 200)):
            response = await house.client.get(path)
            assert (response.status_code, response.json()) == (status, {"status": "empty"})
        assert (await house.client.get("/v1/models")).json()["data"] == []
        for path, body in (("/v1/chat/completions", chat()), ("/tokenize", {"prompt": "x"})):
            assert (await house.client.post(path, json=body)).status_code == 404
        house.may_go_on.set()
        await house.load(name="m")
        await house.until("ready", "m")
        assert (await house.client.get("/health")).status_code == 200


async def test_a_stop_gives_up_loads_and_waits_for_what_drains(home: Path) -> None:
    async with housing(home) as house:
        await house.load()
        await house.unload("m", drain=100)
        stopping = asyncio.create_task(house.service.stop(drain=100))
        await wait_until(lambda: house.service.loader.loads == [])
        assert (await house.load()).json()["error"]["code"] == "model_busy"
        assert house.first.alive and not stopping.done()
        house.first.may_stop.set()
        await stopping
        assert not house.first.alive


async def test_failed_loads_are_remembered_up_to_a_number(home: Path) -> None:
    async with housing(home) as house:
        house.failure = SourceError("no")
        house.may_go_on.set()
        for number in range(MAX_FAILED + 3):
            await house.load(DEFAULT_MODEL, name=f"m{number}")
            await wait_until(lambda: not any(load.is_under_way for load in house.service.loader.loads))
        kept = [f"m{number}" for number in range(3, MAX_FAILED + 3)]
        await wait_until(lambda: [load.name for load in house.service.loader.loads] == kept)


# Several models, an encoder among them


@asynccontextmanager
async def three() -> AsyncIterator[tuple[Client, dict[str, FakeEngine]]]:
    """Two language models, and an encoder in the process of the first."""
    configured = Settings(model=("a", "b"), served_model_name=("a", "b"), admin_key=("the-key",))
    engines = {"a": FakeEngine(), "b": FakeEngine()}
    models = [ServedModel(names=(name,), source=name, engine=engines[name], text=FakeText()) for name in "ab"]
    models.append(
        ServedModel(names=("e",), source="e", engine=engines["a"], text=FakeText(), kind=Kind.EMBED, host="a")
    )
    app = create_app(configured, models)
    async with app.router.lifespan_context(app):
        await wait_until(lambda: app.state.service.started)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            yield client, engines


async def test_requests_go_to_the_model_they_name() -> None:
    async with three() as (client, engines):
        for name in ("b", "b", "a"):
            answer = await client.post("/v1/chat/completions", json=chat(model=name))
            assert answer.json()["model"] == name
        assert [len(engine.requests) for engine in engines.values()] == [1, 2]
        missing = (await client.post("/v1/chat/completions", json=chat(model="c"))).json()["error"]
        assert (missing["code"], missing["param"]) == ("model_not_found", "model")
        assert missing["message"] == "The model 'c' does not exist here; this server has a, b, e."
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(one["id"], one["kind"], one["state"]) for one in listed] == [
            ("a", "generate", "ready"),
            ("b", "generate", "ready"),
            ("e", "embed", "ready"),
        ]
        metrics = (await client.get("/metrics")).text
        assert 'seraph_completion_tokens_total{model="b"} 26.0' in metrics
        assert 'seraph_engine_steps_total{model="b"} 41.0' in metrics and 'steps_total{model="e"}' not in metrics


async def test_a_model_must_be_named_where_there_are_several() -> None:
    async with three() as (client, _):
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [65]})):
            error = (await client.post(path, json=body)).json()["error"]
            assert (error["code"], error["param"]) == ("missing_required_parameter", "model")
            assert (await client.post(path, json=body | {"model": "b"})).status_code == 200


async def test_an_encoder_neither_chats_nor_goes_alone() -> None:
    async with three() as (client, _):
        for path, body in (("chat/completions", chat(model="e")), ("completions", {"model": "e", "prompt": "x"})):
            response = await client.post(f"/v1/{path}", json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (400, "model_not_supported")
        for name, other in (("a", "e"), ("e", "a")):
            response = await client.delete(f"{ADMIN}/{name}", headers=KEY)
            assert (response.status_code, response.json()["error"]["code"]) == (409, "model_shared")
            assert f"shares its process with {other}" in response.json()["error"]["message"]


async def test_health_says_which_model_is_in_trouble() -> None:
    async with three() as (client, engines):
        assert (await client.get("/health")).json() == {"status": "ready"}
        engines["b"].ready = False
        restarting = await client.get("/health")
        assert (restarting.status_code, restarting.json()) == (
            503,
            {"status": "restarting", "models": {"b": "restarting"}},
        )
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=chat(model="a"))).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][1]["state"] == "restarting"
        engines["b"].alive = False
        dead = await client.get("/health/live")
        assert (dead.status_code, dead.json()) == (503, {"status": "dead", "models": {"b": "dead"}})
        assert (await client.delete(f"{ADMIN}/b", headers=KEY)).status_code == 202
        assert (await client.get("/health/live")).status_code == 200
