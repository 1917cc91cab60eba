"""/openapi.json, /docs and docs/api.md: true, current, and all from here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from server.api_reference import page
from server.app import create_app
from server.openapi import BODIES
from server.schemas import examples
from server.schemas.admin import AdminModel, AdminModelList
from server.schemas.chat import ChatCompletion
from server.schemas.completions import Completion
from server.schemas.fields import CHAT_FIELDS, COMPLETION_FIELDS, TOKENIZE_FIELDS
from server.schemas.models import Model, ModelList
from server.schemas.scores import RerankResult, ScoreList
from server.schemas.tokenization import Detokenized, Tokenized
from tests.server.fakes import FakeEngine
from tests.server.support import Client, chunks_of, client_for, settings

ANSWER_MODELS: dict[tuple[str, str], type[BaseModel]] = {
    ("post", "/v1/chat/completions"): ChatCompletion,
    ("post", "/v1/completions"): Completion,
    ("post", "/v1/score"): ScoreList,
    ("post", "/v1/rerank"): RerankResult,
    ("post", "/tokenize"): Tokenized,
    ("post", "/detokenize"): Detokenized,
    ("get", "/v1/models"): ModelList,
    ("get", "/v1/models/{id}"): Model,
    ("get", "/admin/models"): AdminModelList,
    ("post", "/admin/models"): AdminModel,
    ("get", "/admin/models/{name}"): AdminModel,
    ("delete", "/admin/models/{name}"): AdminModel,
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(settings(), []).openapi()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "docs/api.md is stale: run `make docs`"


def test_the_page_has_every_field_and_route(document: dict[str, Any]) -> None:
    text = page()
    for path in document["paths"]:
        assert f" {path}\n" in text
    for table in (CHAT_FIELDS, COMPLETION_FIELDS, TOKENIZE_FIELDS):
        for name, field in table.items():
            assert re.search(rf"^\| `{name}` \| {field.use.value} \|", text, re.MULTILINE), name


# Examples


def test_every_body_and_answer_has_an_example(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert {"4XX", "5XX"} < operation["responses"].keys() and "422" not in operation["responses"]
            success = operation["responses"].get("200") or operation["responses"]["202"]
            if path != "/metrics":  # text for Prometheus
                assert "example" in success["content"]["application/json"], (method, path)
            if method == "post":
                assert "example" in operation["requestBody"]["content"]["application/json"], path
    text = json.dumps(document)
    for reference in re.findall(r"#/components/schemas/(\w+)", text):
        assert reference in document["components"]["schemas"]


@pytest.mark.parametrize("path", BODIES)
def test_example_bodies_are_valid_and_every_field_works(path: str) -> None:
    body = BODIES[path].model_validate(examples.BODIES[path])
    found = body.inspect()
    assert (found.hints, found.unknown) == ((), ())


def shape(value: Any) -> Any:
    """Keys all the way down; of a list its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(item) for item in value[:1]] if isinstance(value, list) else None


@pytest.mark.parametrize("path", examples.EVENTS)
async def test_example_answers_are_what_the_server_sends(path: str) -> None:
    async with client_for(FakeEngine(), settings(served_model_name=("smollm2-135m-instruct",))) as client:
        answer = await client.post(path, json=examples.BODIES[path])
        stream = await client.post(path, json={**examples.BODIES[path], "stream": True})
    assert answer.status_code == 200, answer.text
    assert shape(answer.json()) == shape(examples.ANSWERS["post", path])
    events = [chunk for chunk in chunks_of(stream.text) if chunk["choices"][0]["finish_reason"] is None]
    assert shape(events[-1]) == shape(examples.EVENTS[path])


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/models", "/version", "/health"])
async def test_example_answers_of_utilities(client: Client, path: str) -> None:
    if path.endswith("tokenize"):
        body = {**examples.BODIES[path], "model": "m"} | ({"tokens": [81]} if path == "/detokenize" else {})
        answer, method = (await client.post(path, json=body)).json(), "post"
    else:
        answer, method = (await client.get(path)).json(), "get"
    expected = shape(examples.ANSWERS[method, path])
    if path == "/v1/models":  # the numbers are another model's
        expected["data"][0]["generation_defaults"] = {}
    assert shape(answer) == expected


@pytest.mark.parametrize(("operation", "model"), ANSWER_MODELS.items(), ids=str)
def test_example_answers_fit_their_models(operation: tuple[str, str], model: type[BaseModel]) -> None:
    made = model.model_validate(examples.ANSWERS[operation])
    assert made.model_dump(mode="json") == examples.ANSWERS[operation]


# The page


async def test_the_page_needs_nothing_from_elsewhere(client: Client) -> None:
    response = await client.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
    assert "//" not in response.text.replace("<!doctype", "")
    files = re.findall(r'(?:src|href)="([^"#]+)"', response.text)
    assert len(files) == 5
    for name in files:
        if name != "data:,":
            found = await client.get(f"/{name}")
            assert found.status_code == 200, name
            assert name == "openapi.json" or found.headers["x-content-type-options"] == "nosniff"
    start = (await client.get("/docs/start.js")).text
    assert "http" not in start and "validatorUrl: null" in start
    bundle = (await client.get("/docs/swagger-ui-bundle.js")).text
    assert len(bundle) > 1_000_000 and "SwaggerUIBundle" in bundle


@pytest.mark.parametrize("name", ["..%2fcore.py", "core.py", "redoc.standalone.js", "%2e%2e/x"])
async def test_no_other_file_of_the_package_is_served(client: Client, name: str) -> None:
    assert (await client.get(f"/docs/{name}")).status_code == 404
