"""Which servers a load test may be pointed at."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

MAX_USERS = 512
MAX_SECONDS = 3600


class TargetError(ValueError):
    """The address is no server that this load test may be pointed at."""


def check_target(url: str, *, allow_remote: bool) -> None:
    """Raises TargetError unless `url` is http(s) and, without `allow_remote`, on this machine's loopback."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise TargetError(f"--url must be http://host:port, got {url!r}")
    if not (allow_remote or is_loopback(host)):
        raise TargetError(f"{host} is another machine: load tests stay on loopback unless --allow-remote is given")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
