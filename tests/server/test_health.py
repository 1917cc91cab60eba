"""Health through the engine's life, models, version, metrics, the OpenAPI document."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client import REGISTRY, Counter
from prometheus_client.parser import text_string_to_metric_families

from engine.errors import EngineError, ModelError, SeraphError
from server.app import create_app
from tests.server.fakes import MAX_MODEL_LEN, FakeEngine
from tests.server.support import Client, chat, client_for, served, settings, wait_until


async def status_of(client: Client) -> tuple[str, int, int, int]:
    ready = await client.get("/health/ready")
    live = await client.get("/health/live")
    return ready.json()["status"], ready.status_code, (await client.get("/health")).status_code, live.status_code


async def test_starting_ready_restarting_dead_draining() -> None:
    engine = FakeEngine()
    engine.may_start = asyncio.Event()
    app = create_app(settings(), [served(engine)])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        async with app.router.lifespan_context(app):
            assert await status_of(client) == ("starting", 503, 503, 200)
            for path in ("/v1/chat/completions", "/v1/models"):
                response = await (client.post(path, json=chat()) if "chat" in path else client.get(path))
                assert response.status_code == 503
                assert response.headers["retry-after"] == "1"
                assert response.json()["error"]["code"] == "not_ready"
            engine.may_start.set()
            await wait_until(lambda: app.state.service.started)
            assert await status_of(client) == ("ready", 200, 200, 200)
            engine.ready = False
            assert await status_of(client) == ("restarting", 503, 503, 200)
            engine.alive = False
            assert await status_of(client) == ("dead", 503, 503, 503)
            engine.alive = engine.ready = True
            assert await status_of(client) == ("ready", 200, 200, 200)
        assert await status_of(client) == ("draining", 503, 503, 200)
    assert engine.stopped


async def test_an_engine_that_does_not_start_is_told_once() -> None:
    told: list[SeraphError | None] = []

    class Broken(FakeEngine):
        async def start(self) -> None:
            raise ModelError("no such model")

    app = create_app(settings(), [served(Broken())], on_started=told.append)
    async with app.router.lifespan_context(app):
        await wait_until(lambda: bool(told))
        assert app.state.service.status == "dead"
    assert [str(error) for error in told] == ["no such model"]


async def test_a_start_that_a_stop_ends_is_no_failure() -> None:
    told: list[SeraphError | None] = []

    class Ended(FakeEngine):
        async def start(self) -> None:
            await self.ended.wait()
            raise EngineError("the engine process was killed by SIGTERM before it was ready")

        async def stop(self, drain: float) -> None:
            self.ended.set()

        ended = asyncio.Event()

    app = create_app(settings(), [served(Ended())], on_started=told.append)
    async with app.router.lifespan_context(app):
        service = app.state.service
        service.draining = True
        await service.stop(drain=10.0)
        await wait_until(lambda: bool(service.started))
    assert told == []


async def test_models() -> None:
    async with client_for(FakeEngine(), settings(served_model_name=("org/big", "small"))) as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [(m["id"], m["object"], m["max_model_len"]) for m in listed["data"]] == [
            ("org/big", "model", MAX_MODEL_LEN),
            ("small", "model", MAX_MODEL_LEN),
        ]
        assert (await client.get("/v1/models/org/big")).json() == listed["data"][0]
        answer = await client.post("/v1/chat/completions", json={**chat(), "model": "small"})
        assert answer.json()["model"] == "small"


async def test_version(client: Client) -> None:
    assert (await client.get("/version")).json()["version"]


async def test_metrics_tell_what_happened(client: Client) -> None:
    await client.post("/v1/chat/completions", json=chat())
    await client.post("/v1/chat/completions", json=chat(n=0))
    await client.get("/nowhere/" + "x" * 50)
    text = (await client.get("/metrics")).text
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[name, tuple(sorted(labels.items()))]

    route = "/v1/chat/completions"
    assert value("seraph_http_requests_total", method="POST", route=route, status="200") == 1
    assert value("seraph_http_requests_total", method="POST", route=route, status="400") == 1
    assert value("seraph_http_requests_total", method="", route="unmatched", status="404") == 1
    assert value("seraph_http_request_seconds_count", route=route) == 2
    assert value("seraph_time_to_first_token_seconds_count", model="m") == 1
    assert value("seraph_inter_token_latency_seconds_count", model="m") == 12
    assert value("seraph_time_per_output_token_seconds_count", model="m") == 1
    assert value("seraph_prompt_tokens_total", model="m") == 3
    assert value("seraph_completion_tokens_total", model="m") == 13
    assert value("seraph_choices_finished_total", model="m", reason="stop") == 1
    assert value("seraph_sequences", model="m") == 0
    assert value("seraph_engine_num_blocks", model="m") == 7
    assert value("seraph_engine_steps_total", model="m") == 41
    assert "xxxx" not in text


async def test_vllm_s_own_metrics_beside_ours() -> None:
    """As vLLM does it: counters in the library's registry, which it makes anew whenever it starts."""
    engine = FakeEngine()
    own = Counter("vllm:request_success", "Of vLLM", ["model_name"])
    foreign = Counter("other_library", "Of nobody here")
    try:
        own.labels("m").inc(3)
        async with client_for(engine) as client:
            assert "vllm:" not in (await client.get("/metrics")).text  # another engine computes
        engine.name = "vllm"
        async with client_for(engine) as client:
            for value in (3.0, 5.0):
                text = (await client.get("/metrics")).text
                assert f'vllm:request_success_total{{model_name="m"}} {value}' in text
                assert 'seraph_engine_num_blocks{model="m"} 7.0' in text
                names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
                assert len(names) == len(set(names))
                assert "other_library" not in text and "python_info" not in text
                REGISTRY.unregister(own)
                own = Counter("vllm:request_success", "Of vLLM", ["model_name"])
                own.labels("m").inc(5)
            engine.ready = False  # it restarts: what there is is told
            assert "vllm:request_success_total" in (await client.get("/metrics")).text
    finally:
        REGISTRY.unregister(own)
        REGISTRY.unregister(foreign)


async def test_two_applications_count_apart() -> None:
    async with client_for(FakeEngine()) as one, client_for(FakeEngine()) as other:
        await one.post("/v1/chat/completions", json=chat())
        assert 'seraph_completion_tokens_total{model="m"} 13.0' in (await one.get("/metrics")).text
        assert 'seraph_completion_tokens_total{model="m"} 0.0' in (await other.get("/metrics")).text


async def test_the_openapi_document_describes_the_bodies(client: Client) -> None:
    document = (await client.get("/openapi.json")).json()
    for path, name in (("/v1/chat/completions", "ChatCompletionRequest"), ("/v1/completions", "CompletionRequest")):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert "temperature" in document["components"]["schemas"][name]["properties"]
    text = str(document)
    for reference in {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in document["components"]["schemas"]


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_a_dead_engine_does_not_break_observation(path: str) -> None:
    engine = FakeEngine()
    async with client_for(engine) as client:
        engine.alive = engine.ready = False
        response = await client.get(path)
        assert response.status_code == (503 if path == "/health" else 200)
