"""A real server with tiny random models for whatever speaks to servers: a decoder, an encoder and a cross-encoder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from engine.config import DEFAULT_MODEL
from tests.live import ENGINE, live_server
from tests.tiny_encoders import ENCODERS, seed_of
from tests.tiny_gguf import write_tiny_llama

KEY = "example-key"
ADMIN_KEY = "operator-key"
CONTEXT = 8192 if ENGINE == "vllm" else 16_384
"""Of the decoder "tiny": long enough for an answer that outlasts whatever is to interrupt it."""

SECONDS = 30.0
"""After which a condition will not come true any more."""


@dataclass(frozen=True)
class Live:
    """The server's address, and where its models lie."""

    url: str
    folder: Path

    def wait_until_idle(self) -> None:
        """Wait until no request is at work in the engine."""
        deadline = time.monotonic() + SECONDS
        while self.metric("seraph_engine_num_running"):
            assert time.monotonic() < deadline, "requests go on running"

    def metric(self, name: str) -> float:
        """A metric's sum over all models."""
        text = httpx.get(self.url + "/metrics", headers={"authorization": f"Bearer {KEY}"}).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))


@contextmanager
def start(folder: Path) -> Iterator[Live]:
    """Serve "tiny" (generates), "minilm" (embeds) and "cross" (scores); "bge" lies beside them, to be loaded."""
    write_tiny_llama(folder / "tiny.gguf", context=CONTEXT, seed=1)
    for name in ("minilm", "bge", "cross"):
        ENCODERS[name].write(folder / name, seed_of(name))
    decoder: str | Path = folder / "tiny.gguf"
    flags = ["--threads", "1", "--kv-cache-tokens", str(CONTEXT), "--allow-remote-load"]
    keys = {"SERAPH_API_KEY": KEY, "SERAPH_ADMIN_KEY": ADMIN_KEY}
    if ENGINE == "vllm":  # JSON of a random model need not end: vLLM's grammars bound no white space
        decoder = DEFAULT_MODEL
        flags += ["--served-model-name", "tiny", "cross", "minilm"]
    else:
        keys["SERAPH_HOME"] = str(folder / "home")
    with live_server(
        decoder, folder / "cross", "--embedding-model", folder / "minilm", *flags, environment=keys
    ) as server:
        yield Live(server.base_url, folder)
