from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from loadtests.peers import serving
from loadtests.peers.plan import Task
from loadtests.peers.processes import SystemFailure
from loadtests.peers.serving import Server

# Healthy at once; answers chats with as many tokens as were asked for, and writes down who was asked for how many.
SCRIPT = """
import http.server, json, sys
port, name, notes, fails = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words): pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self):
        tokens = json.loads(self.rfile.read(int(self.headers["content-length"])))["max_tokens"]
        with open(notes, "a") as file:
            file.write(f"{name} {tokens}\\n")
        usage = {"completion_tokens": tokens, "prompt_tokens": 7}
        events = {"choices": [{"delta": {"content": "a"}}]}, {"choices": [], "usage": usage}
        self.send_response(500 if str(tokens) in fails else 200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for event in events:
            line = b"data: " + json.dumps(event).encode() + b"\\n\\n"
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(line), line))
        self.wfile.write(b"0\\r\\n\\r\\n")

class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64

Server(("127.0.0.1", port), Handler).serve_forever()
"""

TASK = Task(
    name="serve", kind="serve", family="serve", concurrency=(2, 4, 1), waves=3, spread=0.5, tokens=8, seconds=60.0
)


def servers(folder: Path, *fails: str) -> dict[str, Server]:
    command = [sys.executable, "-c", SCRIPT, "{port}"]
    return {name: Server([*command, name, folder / "notes", *fails], {}, folder / f"{name}.log") for name in "ab"}


def test_servers_take_turns_while_both_are_alive(tmp_path: Path) -> None:
    figures = serving.measure_in_turn(servers(tmp_path), TASK)
    asked = [line.split() for line in (tmp_path / "notes").read_text().splitlines()]
    starts, trials = asked[:2], asked[2 : 2 + 2 * 16]
    assert sorted(starts) == [["a", "4"], ["b", "4"]]
    assert [name for name, _ in trials] == ["a"] * 16 + ["b"] * 16
    expected = [(name, n) for order, n in (("ab", 2), ("ba", 4), ("ab", 1)) for name in order]
    measured = asked[len(starts) + len(trials) :]
    assert [name for name, _ in measured] == [name for name, n in expected for _ in range(3 * n)]
    lengths = {name: sorted(int(tokens) for other, tokens in measured if other == name) for name in "ab"}
    assert lengths["a"] == lengths["b"] and len(set(lengths["a"])) > 3
    assert lengths["a"][0] >= 4 and lengths["a"][-1] <= 12
    for of_one in figures.values():
        assert all(of_one[f"tokens_per_second@{n}"] > 0 and of_one[f"ttft@{n}"] > 0 for n in TASK.concurrency)
        assert all(of_one[f"cpu_seconds@{n}"] >= 0 and of_one[f"client_cpus@{n}"] > 0 for n in TASK.concurrency)
        assert all(0 <= of_one[f"idle_cpus@{n}"] < 2 for n in TASK.concurrency)
        assert of_one["start_seconds"] > 0 and of_one["memory_mb"] > 0
        assert "tokens_per_second@16" not in of_one


def test_a_server_that_fails_in_its_turn(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="status 500"):
        serving.measure_in_turn(servers(tmp_path, "8"), replace(TASK, spread=0.0))
