"""Several models in one real server, each with a process of its own: what happens to one does not harm the others."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.weights import parse
from engine.weights.store import lock_path
from tests.live import LiveServer, live_server
from tests.tiny_gguf import write_tiny_llama

pytestmark = pytest.mark.native("models that come and go while the server runs")

CONTEXT = 16_384
KEY = {"authorization": "Bearer the-key"}
FLAGS = ("--threads", "1", "--kv-cache-tokens", str(CONTEXT), "--admin-key", "the-key", "--allow-remote-load")
SECONDS = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for place, name in enumerate("abc"):
        write_tiny_llama(path / f"{name}.gguf", context=CONTEXT, seed=place)
    return path


class House:
    """A server with the models a and b, and what it leaves on this machine."""

    def __init__(self, server: LiveServer, folder: Path, temporary: Path) -> None:
        self.server = server
        self.folder = folder
        self.temporary = temporary
        self.client = httpx.Client(base_url=server.base_url, timeout=SECONDS)

    def state(self, name: str) -> str | None:
        response = self.client.get(f"/admin/models/{name}", headers=KEY)
        return response.json()["state"] if response.status_code == 200 else None

    def pid(self, name: str) -> int:
        return int(self.client.get(f"/admin/models/{name}", headers=KEY).json()["pid"])

    def load(self, source: str, **body: Any) -> httpx.Response:
        path = str(self.folder / source)
        return self.client.post("/admin/models", headers=KEY, json={"model": path, **body})

    def unload(self, name: str, **query: float) -> httpx.Response:
        return self.client.delete(f"/admin/models/{name}", headers=KEY, params=query)

    def answer(self, model: str, num_tokens: int = 40) -> str:
        response = self.client.post("/v1/completions", json=body_of(model, num_tokens))
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    @contextmanager
    def streaming(self, model: str, num_tokens: int) -> Iterator[Future[tuple[str, str]]]:
        """A stream that has begun: its text, and its last event."""
        body = body_of(model, num_tokens) | {"stream": True}
        with (
            ThreadPoolExecutor(1) as pool,
            httpx.Client(base_url=self.server.base_url, timeout=SECONDS) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            first = next(lines)

            def rest() -> tuple[str, str]:
                events = [first, *filter(None, lines)]
                chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
                return "".join(chunk["choices"][0]["text"] for chunk in chunks), events[-1]

            yield pool.submit(rest)


def body_of(model: str, num_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": [5, 6, 7], "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@contextmanager
def housing(folder: Path, temporary: Path, *flags: str) -> Iterator[House]:
    environment = {"SERAPH_HOME": str(folder / "home"), "TMPDIR": str(temporary)}
    models = [str(folder / f"{name}.gguf") for name in "ab"]
    with live_server(*models, *FLAGS, *flags, environment=environment) as server:
        house = House(server, folder, temporary)
        with house.client:
            yield house


def end(house: House, number: signal.Signals, status: int = 0) -> None:
    """End the server by a signal: nothing of it is left."""
    processes = children(house.server.process.pid)
    house.server.process.send_signal(number)
    assert house.server.process.wait(SECONDS) == status
    wait_for(lambda: not any(map(is_running, processes)))
    assert list(house.temporary.iterdir()) == []
    assert [path for path in (house.folder / "home" / "packed").iterdir() if path.suffix == ".tmp"] == []
    assert "Traceback" not in "\n".join(house.server.output)


@pytest.fixture(scope="module")
def house(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with housing(folder, tmp_path_factory.mktemp("temporary")) as house:
        yield house
        end(house, signal.SIGTERM)


def test_each_answers_for_itself(house: House) -> None:
    text = "\n".join(house.server.output)
    assert "  model      a\n" in text and "  model      b\n" in text and text.count("1 request of full length") == 2
    answers = [house.answer(name) for name in "ab"]
    assert answers[0] != answers[1] and answers == [house.answer(name) for name in "ab"]
    assert house.pid("a") != house.pid("b")
    missing = house.client.post("/v1/completions", json=body_of("c", 4))
    assert missing.status_code == 404 and "this server has a, b" in missing.json()["error"]["message"]


def test_streams_go_on_while_models_come_and_go(house: House) -> None:
    expected = {name: house.answer(name, 2000) for name in "ab"}
    over = threading.Event()

    def stream_on(name: str) -> list[str]:
        """Stream after stream, until the coming and going is over; what was wrong with one of them."""
        wrong, num_streams = [], 0
        while not over.is_set() or not num_streams:
            with house.streaming(name, 2000) as stream:
                if (ended := stream.result()) != (expected[name], "data: [DONE]"):
                    wrong.append(repr(ended)[-200:])
            num_streams += 1
        return wrong

    with ThreadPoolExecutor(2) as pool:
        try:
            streams = [pool.submit(stream_on, name) for name in "ab"]
            assert house.load("c.gguf").status_code == 202
            wait_for(lambda: house.state("c") == "ready")
            assert house.load("c.gguf").json()["error"]["code"] == "model_exists"
            assert house.answer("c") not in (house.answer("a"), house.answer("b"))
            engine = house.pid("c")
            with house.streaming("c", 2000) as last:
                house.unload("c", drain=SECONDS)
                assert last.result()[1] == "data: [DONE]"  # it was let finish
            wait_for(lambda: house.state("c") is None)
            assert not is_running(engine)
        finally:
            over.set()
        assert [stream.result() for stream in streams] == [[], []]
    assert house.client.get("/health").json() == {"status": "ready"}


def test_what_outlasts_its_drain_is_cut_off(house: House) -> None:
    house.load("c.gguf")
    wait_for(lambda: house.state("c") == "ready")
    with house.streaming("c", CONTEXT - 8) as stream:
        house.unload("c", drain=0)
        _, last = stream.result()
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
    wait_for(lambda: house.state("c") is None)


def test_a_crash_is_the_affair_of_one(house: House) -> None:
    survivor = house.pid("a")
    expected = house.answer("a", 3000)
    with house.streaming("a", 12_000) as unharmed, house.streaming("b", CONTEXT - 8) as broken:
        os.kill(house.pid("b"), signal.SIGKILL)
        _, last = broken.result()
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        text, last = unharmed.result()
        assert last == "data: [DONE]" and text.startswith(expected)
    wait_for(lambda: house.client.get("/health").status_code == 200)
    assert house.pid("a") == survivor
    assert house.answer("b") == house.answer("b")
    metrics = house.client.get("/metrics").text
    assert 'seraph_engine_restarts_total{model="a"} 0.0' in metrics
    assert 'seraph_engine_restarts_total{model="b"} 1.0' in metrics


def test_a_failed_load_leaves_nothing(house: House) -> None:
    (house.folder / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    before = children(house.server.process.pid)
    for source, said, body in (
        ("bad.gguf", "bad.gguf", {}),
        ("none.gguf", "does not exist", {}),
        ("c.gguf", "The KV memory must be at most", {"kv_cache_memory": "100%"}),
    ):
        name = source.removesuffix(".gguf")
        assert house.load(source, **body).status_code == 202
        wait_for(lambda name=name: house.state(name) == "failed")  # type: ignore[misc]
        assert said in house.client.get(f"/admin/models/{name}", headers=KEY).json()["reason"]
        assert house.unload(name).status_code == 204
    assert children(house.server.process.pid) == before
    packed = (house.folder / "home" / "packed").glob("bad*")
    assert [path for path in packed if path.suffix != ".lock"] == []


@contextmanager
def held(folder: Path, source: str) -> Iterator[None]:
    """Hold the lock of a model's packing, which a load then waits for."""
    path = lock_path(parse(str(folder / source)), folder / "home")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def begin_slow_load(house: House, name: str) -> int:
    """Begin a load that will not end by itself; the process that packs."""
    write_tiny_llama(house.folder / f"{name}.gguf", context=CONTEXT)
    before = set(children(house.server.process.pid))
    assert house.load(f"{name}.gguf").status_code == 202
    waiting = f"waiting for another process: packing {name}"
    wait_for(lambda: any(waiting in line for line in house.server.output))
    (packing,) = set(children(house.server.process.pid)) - before
    return packing


def test_a_load_is_given_up(house: House) -> None:
    with held(house.folder, "slow.gguf"):
        packing = begin_slow_load(house, "slow")
        assert house.state("slow") == "fetching"
        assert house.unload("slow").json()["state"] == "cancelled"
        wait_for(lambda: house.state("slow") is None)
        assert not is_running(packing)


def test_ctrl_c_during_a_load_is_clean(folder: Path, tmp_path: Path) -> None:
    with housing(folder, tmp_path) as house, held(folder, "late.gguf"):
        packing = begin_slow_load(house, "late")
        end(house, signal.SIGINT)
        assert not is_running(packing)


def test_a_load_ends_with_a_server_that_is_killed(folder: Path, tmp_path: Path) -> None:
    with housing(folder, tmp_path) as house, held(folder, "killed.gguf"):
        processes = [begin_slow_load(house, "killed"), house.pid("a"), house.pid("b")]
        house.server.process.kill()
        house.server.process.wait(SECONDS)
        wait_for(lambda: not any(map(is_running, processes)))
