"""A server in a process of its own, as people start it: `with live_server(...) as server: server.base_url`."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ENGINE = "native"
"""What computes for servers that tests start; `pytest --engine` says it."""

NATIVE_FLAGS = frozenset({"--threads", "--kv-cache-tokens", "--huge-pages", "--speculation", "--isa"})
"""Flags with a value that make tests quick, or their figures round, and that vLLM has no word for."""

VLLM_FLAGS = ("--engine", "vllm", "--vllm-arg", "enforce-eager=true", "--kv-cache-memory", "1GiB")

_ADDRESS = re.compile(r"^  listening +(http://\S+)$")


SERVE = (sys.executable, "-m", "server.cli", "serve")
VLLM_START = 400.0
"""Seconds; on two cores, with others at work, it takes one or two minutes."""


def head_dim() -> int:
    """Of tiny models for servers: what the engine computes with."""
    return 64 if ENGINE == "vllm" else 16  # vLLM's CPU build dies of less


def over_vllm(arguments: Sequence[str | Path]) -> list[str | Path]:
    """The same models, computed by vLLM."""
    kept: list[str | Path] = []
    words = iter(arguments)
    for word in words:
        if word in NATIVE_FLAGS:
            next(words)
        elif word != "--embedding-model":  # there an encoder is a model like the others
            kept.append(word)
    return [*VLLM_FLAGS, *kept]  # what a test says beats them


@dataclass
class LiveServer:
    """A running server. `output` grows with what it prints, standard output and error together."""

    process: subprocess.Popen[str]
    base_url: str
    ready_seconds: float  # from the start of the process to its ready banner
    output: list[str] = field(default_factory=list)

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 30.0) -> int:
        """Send a signal and wait for the end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


class StartError(Exception):
    """The server ended, or did not get ready in time; holds what it printed."""


@contextmanager
def live_server(
    *arguments: str | Path,
    command: Sequence[str] = SERVE,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120.0,
) -> Iterator[LiveServer]:
    """Start a server on a free loopback port, wait until it is ready, stop it at the end.

    `arguments` go to `seraph serve`; `environment` is added to ours, without any SERAPH_ names but SERAPH_HOME. Raises
    StartError.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SERAPH_")}
    for name in ("SERAPH_HOME",):
        if name in os.environ:
            inherited[name] = os.environ[name]
    inherited["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited["PYTHONUNBUFFERED"] = "1"
    if ENGINE == "vllm" and command is SERVE:
        arguments, timeout = tuple(over_vllm(arguments)), VLLM_START
    started = time.monotonic()
    process = subprocess.Popen(
        [*command, "--port", "0", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**inherited, **(environment or {})},
    )
    output: list[str] = []
    addresses: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line.rstrip("\n"))
            if match := _ADDRESS.match(output[-1]):
                addresses.put(match[1])
        addresses.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        try:
            address = addresses.get(timeout=timeout)
        except queue.Empty:
            raise StartError(f"not ready after {timeout:g} s:\n" + "\n".join(output)) from None
        if address is None:
            raise StartError(f"exited with status {process.wait(timeout)}:\n" + "\n".join(output))
        yield LiveServer(process, address, time.monotonic() - started, output)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()
