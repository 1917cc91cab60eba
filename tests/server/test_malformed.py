"""Bodies that are nearly right: each gets an answer or a 4xx that says what is wrong, and nothing is left behind.

`make test` sends few to each endpoint, the same ones every time; `make test-full` 1,000 new ones.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as examples_of

from engine.backends.base import Engine
from engine.backends.packing import Work
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import SourceError
from engine.request import EncoderInfo
from engine.text import EncoderText, ModelText, Tokenizer
from engine.weights import PackedModel, load_model
from server.app import create_app
from server.kinds import Kind
from server.loading import Loader
from server.openapi import BODIES
from server.registry import ServedModel
from server.routes.service import Service
from tests.server.bodies import bodies
from tests.server.core_engine import CoreEngine
from tests.server.fakes import FakeEngine
from tests.server.support import settings, wait_until
from tests.tiny_encoders import VOCAB_SIZE, tokenizer_json
from tests.tiny_gguf import CHAT_TEMPLATE, TinyLlama

pytestmark = pytest.mark.native("the books of our own core, step by step")

NUM_SHORT, NUM_LONG = 60, 1000
TOOLS = "{% if messages[0].role == 'tool' or messages[0].tool_calls %}{% endif %}"
KEY = {"authorization": "Bearer the-key", "content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    folder = tmp_path_factory.mktemp("home")
    tiny = TinyLlama(context=128)
    tiny.metadata["tokenizer.chat_template"] = TOOLS + CHAT_TEMPLATE.replace(
        "message['content']", "(message['content'] or '')"
    )
    tiny.write(folder / "tiny.gguf")
    return load_model(str(folder / "tiny.gguf"), home=folder)


@asynccontextmanager
async def application(model: PackedModel, folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, CoreEngine, Service]]:
    """A real decoder with its text side, and scripted encoders of both kinds; loads find nothing to load."""
    core = EngineCore(EngineConfig(model="tiny", threads=1, kv_cache_tokens=1024, max_num_seqs=8), model)
    engine, encoders = CoreEngine(core), FakeEngine()
    encoders.encoder = EncoderInfo(
        model="encoder", output_size=1, max_input_len=64, vocab_size=VOCAB_SIZE, num_labels=1
    )
    encoders.embedding = lambda request: np.ones((len(request.inputs), 1), np.float32)
    text = EncoderText(Tokenizer(tokenizer_json(pairs_have_types=True), vocab_size=VOCAB_SIZE), 64)
    configured = settings(admin_key=("the-key",), max_num_seqs=8, max_num_batched_tokens=512)

    def served(name: str, engine: Engine, text: Any, kind: Kind) -> ServedModel:
        return ServedModel(names=(name,), source=name, engine=engine, text=text, kind=kind)

    app = create_app(
        configured,
        [
            served("smollm2-135m-instruct", engine, ModelText.from_info(model.info), Kind.GENERATE),
            served("all-minilm-l6-v2", encoders, text, Kind.EMBED),
            served("cross", encoders, text, Kind.SCORE),
        ],
        make_loader=partial(Loader, prepare=_prepare),
    )
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with app.router.lifespan_context(app):
        service: Service = app.state.service
        await wait_until(lambda: service.started)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield client, engine, service


async def _prepare(config: EngineConfig, report: Callable[[Work], None]) -> None:
    raise SourceError("There is nothing to load.")


def check(response: httpx.Response) -> None:
    if response.status_code >= 400:
        assert response.status_code < 500, response.text
        error = response.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 3000
        assert error["type"] in ("invalid_request_error", "permission_error")
    elif response.headers["content-type"] != "application/json":
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        assert events.pop() == "[DONE]", response.text[-500:]
        assert all("error" not in json.loads(event) for event in events)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("number", [NUM_SHORT, pytest.param(NUM_LONG, marks=pytest.mark.full)])
def test_malformed_bodies(model: PackedModel, tmp_path: Path, path: str, number: int) -> None:
    with asyncio.Runner() as runner:
        context = application(model, tmp_path)
        client, engine, service = runner.get_loop().run_until_complete(context.__aenter__())
        seen: Counter[int] = Counter()

        async def send(body: bytes) -> None:
            async with asyncio.timeout(20):
                response = await client.post(path, content=body, headers=KEY)
                check(response)
                seen[response.status_code] += 1
                await wait_until(lambda: engine.is_idle)
            engine.core.check_integrity()
            assert all(model.gate.num_sequences == 0 for model in service.models)

        @examples_of(
            max_examples=number,
            phases=(Phase.generate, Phase.shrink),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(body=bodies(path))
        def run(body: bytes) -> None:
            runner.get_loop().run_until_complete(send(body))

        try:
            (seed(zlib.crc32(path.encode()))(run) if number == NUM_SHORT else run)()
            # Bodies must be neither so wrong that nothing is reached, nor so right that nothing is tried.
            assert seen[400] > number // 8 and seen[200] + seen[202] >= number // 60, seen
            stats = engine.core.stats()
            assert stats.num_free_blocks == stats.num_blocks
        finally:
            runner.get_loop().run_until_complete(context.__aexit__(None, None, None))
