"""The door: who may come in (keys, hosts), and whether there is room (the bounded queue)."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engine.errors import EngineOverloadedError
from server.errors import AdminClosedError, AuthenticationError, HostNotAllowedError
from server.metrics import ModelMetrics
from server.settings import is_loopback

Headers = Sequence[tuple[bytes, bytes]]
"""As ASGI gives them: names in lower case, both sides bytes."""

DOCUMENTATION_PATHS = ("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json")
OPEN_PATHS = ("/health", "/health/live", "/health/ready", *DOCUMENTATION_PATHS)
"""Answered without a key: orchestrators have none, and they tell only whether the server is up. /metrics needs it.

Nor does a browser that follows a link to the documentation, which is the same everywhere.
"""


@dataclass(frozen=True, slots=True)
class Principal:
    """On whose behalf a request runs. Prefix-cache blocks and quotas are shared within a tenant, never across."""

    tenant: str
    key_id: str


ANONYMOUS = Principal(tenant="", key_id="")


class Keys:
    """The keys that open the door; with none, everyone is ANONYMOUS."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests have one length, so that comparing them in constant time tells nothing of a key's own length.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def authenticate(self, headers: Headers) -> Principal:
        """The principal behind `Authorization: Bearer` or `x-api-key`. Raises AuthenticationError."""
        if not self._digests:
            return ANONYMOUS
        offered = _offered_key(headers)
        if offered is None:
            raise AuthenticationError("A key is needed: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.")
        digest = hashlib.sha256(offered).digest()
        # Every key is compared, so that the time does not tell which one was near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise AuthenticationError("The key is wrong.")
        return Principal(tenant="", key_id=f"key-{matches.index(True)}")


class AdminKeys:
    """The keys that open /admin, which no other key does."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = Keys(keys)
        self._open = bool(keys)

    def authenticate(self, headers: Headers) -> Principal:
        """The operator. Raises AdminClosedError where no key was set, AuthenticationError for none or a wrong one."""
        if not self._open:
            raise AdminClosedError("/admin is closed: start the server with --admin-key or SERAPH_ADMIN_KEY.")
        return Principal(tenant="", key_id=f"admin-{self._keys.authenticate(headers).key_id}")


def is_admin_path(path: str) -> bool:
    """Whether a path is the operator's."""
    return path == "/admin" or path.startswith("/admin/")


def _offered_key(headers: Headers) -> bytes | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return None


class HostPolicy:
    """Which Host headers are answered.

    A browser page whose name resolves to 127.0.0.1 (DNS rebinding) could otherwise read what a loopback server says.
    A server that listens beyond loopback answers every name, unless `allowed` names some.
    """

    def __init__(self, bind_host: str, allowed: Sequence[str]) -> None:
        self._any = "*" in allowed or (not allowed and not is_loopback(bind_host))
        self._allowed = {host.lower().strip("[]") for host in (*allowed, bind_host, "localhost")}

    def check(self, headers: Headers) -> None:
        """Raises HostNotAllowedError."""
        if self._any:
            return
        raw = next((value for name, value in headers if name == b"host"), b"")
        host = _without_port(raw.decode("latin-1")).lower()
        if host not in self._allowed and not is_loopback(host):
            raise HostNotAllowedError(
                f"This server does not answer for host {host[:255]!r}. Its operator can add it with --allowed-host."
            )


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class Gate:
    """Bounds the sequences of one model inside the server: those being computed plus a waiting queue.

    Refusal is 503 with Retry-After: the model has no room for anyone (429 would say that one caller asks too much).
    """

    def __init__(self, *, max_running: int, max_waiting: int, metrics: ModelMetrics) -> None:
        self._limit = max_running + max_waiting
        self._max_running = max_running
        self._metrics = metrics
        self.num_sequences = 0

    @contextmanager
    def enter(self, num_sequences: int) -> Iterator[None]:
        """Hold room for the sequences of one request. Raises EngineOverloadedError where there is none.

        An empty server takes any request: one larger than the limit would otherwise never be served.
        """
        if self.num_sequences and self.num_sequences + num_sequences > self._limit:
            self._metrics.refusals.inc()
            waiting = max(0, self.num_sequences - self._max_running)
            raise EngineOverloadedError(
                f"The server is at its limit of {self._limit} sequences ({waiting} waiting). Try again later.",
                retry_after=1.0 + waiting / self._max_running,
            )
        self.num_sequences += num_sequences
        self._metrics.sequences.set(self.num_sequences)
        try:
            yield
        finally:
            self.num_sequences -= num_sequences
            self._metrics.sequences.set(self.num_sequences)
