"""The environment: settings that mean nothing or cannot work, versions of what the server runs on, the port."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata

from engine.errors import ConfigError
from server.doctor.finding import Finding, ok, problem, warning
from server.serving import bind
from server.settings import resolve, unknown_environment, version

DISTRIBUTIONS = (
    "fastapi",
    "fastapi-offline",
    "gguf",
    "httptools",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "llguidance",
    "msgspec",
    "numpy",
    "prometheus-client",
    "pydantic",
    "pyzmq",
    "rich",
    "starlette",
    "tokenizers",
    "typer",
    "uvicorn",
    "uvloop",
)
"""What Seraph declares to need, and what of theirs its own code imports."""


def examine(
    environment: Mapping[str, str] | None = None,
    *,
    distributions: Sequence[str] = DISTRIBUTIONS,
    installed: Callable[[str], str] = metadata.version,
) -> Iterator[Finding]:
    """Findings about `environment` (None: this process's). `installed` tells a distribution's version or raises."""
    yield ok("version", f"Seraph {version()}, Python {platform.python_version()}")
    yield _packages(distributions, installed)
    for name, meant in unknown_environment(environment).items():
        hint = f"Did you mean {meant}? Otherwise unset it." if meant else "Unset it, or correct its spelling."
        yield warning(name, "is set in the environment and means nothing to Seraph", hint)
    try:
        settings = resolve({}, environment)
    except ConfigError as error:
        yield problem("settings", str(error), "Correct it where it is set: the environment or the configuration file.")
        return
    yield ok("settings", f"`seraph serve` would listen on {settings.host} port {settings.port}")
    yield _port(settings.host, settings.port)


def _packages(distributions: Sequence[str], installed: Callable[[str], str]) -> Finding:
    found, missing = [], []
    for name in distributions:
        try:
            found.append(f"{name} {installed(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return problem(
            "packages", f"not installed: {', '.join(missing)}", "Install Seraph again, with what it requires."
        )
    return ok("packages", ", ".join(found))


def _port(host: str, port: int) -> Finding:
    try:
        with bind(host, port):
            return ok("port", f"{port} on {host} is free" if port else "any free one")
    except ConfigError as error:
        return warning("port", str(error), "If that is a Seraph server that runs already, all is well.")
