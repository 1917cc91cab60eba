"""A server that is told to stop while it is stopping: at once, in order, with nothing left."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.serving import ECHO
from tests.live import LiveServer, head_dim, live_server
from tests.tiny_gguf import write_tiny_llama

CONTEXT = 32_768
LONG = {"model": "tiny", "prompt": [5, 6, 7], "stream": True, "ignore_eos": True, "max_tokens": CONTEXT - 8}

LONG_NAME = "tiny" * 4000
"""The model's other name. Each event has it, so that few of them are more than the kernel keeps for a slow peer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("home") / "tiny.gguf"
    write_tiny_llama(path, context=CONTEXT, head_dim=head_dim())
    return path


@pytest.fixture
def server(model: Path) -> Iterator[LiveServer]:
    home = {"SERAPH_HOME": str(model.parent)}
    flags = ["--kv-cache-tokens", str(CONTEXT), "--threads", "1", "--served-model-name", "tiny", LONG_NAME]
    with live_server(model, *flags, environment=home) as running:
        yield running


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"


def children(pid: int) -> list[int]:
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def is_closed(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=5.0).close()
    except OSError:
        return True
    return False


def stop_twice(server: LiveServer, number: signal.Signals) -> list[str]:
    """Send a signal, and again once the first one was obeyed; what the server logs from then on."""
    url = httpx.URL(server.base_url)
    assert url.port is not None
    engines = children(server.process.pid)
    assert engines
    before = len(server.output)
    server.process.send_signal(number)
    wait_for(lambda: is_closed((url.host, url.port or 0)))
    assert server.process.poll() is None, "it waits for the request that runs"
    time.sleep(ECHO)  # what comes sooner is taken for the first one's echo
    server.process.send_signal(number)
    assert server.process.wait(15.0) == 128 + number
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in engines))
    return server.output[before:]


def check_log(lines: list[str], said: str) -> None:
    text = "\n".join(lines)
    assert [line.split(": ", 1)[1] for line in lines if "at once" in line] == [said], text
    assert "ERROR" not in text and "Traceback" not in text, text


def test_a_stream_that_is_cut_off_ends_with_an_error(server: LiveServer) -> None:
    client = httpx.Client(base_url=server.base_url, timeout=20.0)
    with client, client.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        with ThreadPoolExecutor(1) as pool:  # reads on meanwhile
            last = pool.submit(lambda: [line for line in lines if line][-1])
            logged = stop_twice(server, signal.SIGTERM)
            error: dict[str, Any] = json.loads(last.result().removeprefix("data: "))["error"]
    assert error["code"] == "engine_dead"
    check_log(logged, "SIGTERM again: stopping at once, requests cut off: 1")


def test_a_peer_that_reads_nothing_does_not_delay_it(server: LiveServer) -> None:
    """Its request waits for room to write to, and would for as long as --send-timeout allows."""
    body = json.dumps({**LONG, "model": LONG_NAME, "max_tokens": CONTEXT // 4}).encode()
    url = httpx.URL(server.base_url)
    assert url.port is not None
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with peer:
        peer.connect((url.host, url.port))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        peer.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        assert peer.recv(12) == b"HTTP/1.1 200"
        all_computed = 'seraph_engine_num_running{model="tiny"} 0.0'
        wait_for(lambda: all_computed in httpx.get(f"{server.base_url}/metrics").text, 120.0)  # thousands of steps
        logged = stop_twice(server, signal.SIGINT)
    check_log(logged, "SIGINT again: stopping at once, requests cut off: 1")


def test_the_same_signal_twice_at_once_is_one(server: LiveServer) -> None:
    """`timeout` sends it to its child and to the child's group: what runs still ends in peace."""
    body = {**LONG, "stream": False, "max_tokens": 1500}
    with httpx.Client(base_url=server.base_url, timeout=20.0) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, "/v1/completions", json=body)
        wait_for(lambda: 'seraph_engine_num_running{model="tiny"} 1.0' in httpx.get(f"{server.base_url}/metrics").text)
        before = len(server.output)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result().json()["usage"]["completion_tokens"] == 1500
    assert server.process.wait(15.0) == 0
    assert "again" not in "".join(server.output[before:])
