"""Who may come in: keys, hosts, origins, addresses, heads."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError
from server.admission import OPEN_PATHS
from server.settings import Settings
from tests.server.fakes import FakeEngine
from tests.server.support import chat, client_for, listening, settings

CHAT = "/v1/chat/completions"
KEYS = ("first-key", "second-key")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer second-key"},
        {"x-api-key": "first-key"},
    ],
)
async def test_the_right_key(headers: dict[str, str]) -> None:
    async with client_for(FakeEngine(), settings(api_key=KEYS)) as client:
        assert (await client.post(CHAT, json=chat(), headers=headers)).status_code == 200
        assert (await client.get("/metrics", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
        {"x-api-key": "first-ke"},
        {"x-api-key": ""},
        {"x-api-key": "schl\u00fcssel".encode()},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/version", "/docs/other", "/nowhere"])
async def test_a_missing_or_wrong_key(headers: dict[str, Any], path: str) -> None:
    engine = FakeEngine()
    async with client_for(engine, settings(api_key=KEYS)) as client:
        method = "POST" if path == CHAT else "GET"
        response = await client.request(method, path, headers=headers, json=chat())
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert not any(key in response.text for key in KEYS)
    assert engine.requests == []


@pytest.mark.parametrize("path", OPEN_PATHS)
async def test_health_and_documentation_need_no_key(path: str) -> None:
    async with client_for(FakeEngine(), settings(api_key=KEYS)) as client:
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "127.8.8.8", "LOCALHOST"]
)
async def test_loopback_hosts(host: str) -> None:
    async with client_for(FakeEngine()) as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "localhost.evil"]
)
async def test_other_hosts_on_loopback(host: str) -> None:
    """A page whose name resolves to 127.0.0.1 sends its own name."""
    async with client_for(FakeEngine()) as client:
        response = await client.get("/v1/models", headers={"host": host})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"
    async with client_for(FakeEngine(), settings(allowed_host=("*",))) as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


async def test_allowed_hosts() -> None:
    async with client_for(FakeEngine(), settings(allowed_host=("llm.example",))) as client:
        assert (await client.get("/v1/models", headers={"host": "llm.example:443"})).status_code == 200
        assert (await client.get("/v1/models", headers={"host": "localhost"})).status_code == 200
        assert (await client.get("/v1/models", headers={"host": "other.example"})).status_code == 403


async def test_a_public_address_answers_for_every_host() -> None:
    async with client_for(FakeEngine(), settings(host="0.0.0.0", insecure=True)) as client:
        assert (await client.get("/v1/models", headers={"host": "llm.example"})).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "llm.example"])
def test_a_public_address_needs_a_key_or_consent(host: str) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        Settings(host=host)
    assert Settings(host=host, api_key=("k",)).host == host
    assert Settings(host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_loopback_needs_neither(host: str) -> None:
    assert Settings(host=host).host == host


PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


async def test_cors_is_off_by_default() -> None:
    async with client_for(FakeEngine()) as client:
        assert (await client.options(CHAT, headers=PREFLIGHT)).status_code == 405
        response = await client.post(CHAT, json=chat(), headers={"origin": "https://app.example"})
        assert "access-control-allow-origin" not in response.headers


async def test_cors_for_named_origins() -> None:
    async with client_for(FakeEngine(), settings(cors_origin=("https://app.example",), api_key=KEYS)) as client:
        preflight = await client.options(CHAT, headers=PREFLIGHT)
        assert preflight.status_code == 200  # without a key: browsers send none
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        refused = await client.post(CHAT, json=chat(), headers={"origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = await client.options(CHAT, headers={**PREFLIGHT, "origin": "https://evil.example"})
        assert other.status_code == 400


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc-123.x:y_z", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False)]
)
async def test_request_ids(sent: str, kept: bool) -> None:
    async with client_for(FakeEngine()) as client:
        for path in ("/v1/models", "/nowhere"):
            answered = (await client.get(path, headers={"x-request-id": sent})).headers["x-request-id"]
            assert (answered == sent) is kept
            assert answered
        first, second = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
        assert first != second


async def test_a_head_over_the_limit() -> None:
    async with listening(FakeEngine()) as url, httpx.AsyncClient() as client:
        fits = await client.get(url + "/health", headers={"x-long": "a" * 30_000})
        assert fits.status_code == 200
        for headers in ({"x-long": "a" * 40_000}, {f"x-{i}": "a" for i in range(130)}):
            response = await client.get(url + "/health", headers=headers)
            assert response.status_code == 431
            assert response.json()["error"]["code"] == "invalid_http"
            assert "at most 32768 bytes and 128 header fields" in response.json()["error"]["message"]
        many = {f"x-{i}": "a" for i in range(100)}
        for _ in range(3):  # each request of a connection is counted by itself
            assert (await client.get(url + "/health", headers=many)).status_code == 200


async def test_a_head_without_an_end_is_not_kept() -> None:
    async with listening(FakeEngine()) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 40_000)
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_what_is_not_http() -> None:
    async with listening(FakeEngine()) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"hello there\r\n\r\n")
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_http"' in answer


@pytest.mark.parametrize("head", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n"])
async def test_a_head_that_does_not_arrive(head: bytes) -> None:
    async with listening(FakeEngine(), head_timeout=0.1) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head)
        async with asyncio.timeout(5):
            assert await reader.read() == b""  # the connection is closed
        writer.close()


async def test_a_body_that_does_not_arrive() -> None:
    async with listening(FakeEngine(), settings(body_timeout=0.1)) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
        writer.write(head.encode() + b'{"model"')
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer


async def test_ten_megabytes_over_the_wire() -> None:
    """The answer arrives although the caller is still sending."""
    async with listening(FakeEngine()) as url, httpx.AsyncClient() as client:
        headers = {"content-type": "application/json"}
        response = await client.post(url + CHAT, content=b" " * (10 << 20), headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
