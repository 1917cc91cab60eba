"""Imports run one way: a module imports only from rooms above its own, and packages only along `server -> engine`.

Every import statement counts: at the top of a module, inside a function, under TYPE_CHECKING, and
`import_module("literal")`. A package's `__init__` is exempt, because it only gathers what its rooms offer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS = {
    "engine": (
        "errors",
        "config",
        "ranks",
        "logs",
        "request",
        "features",
        "models",
        "kernels",
        "weights",
        "resident",
        "text",
        "sampling",
        "cache",
        "scheduler",
        "worker",
        "embedder",
        "core",
        "encoder_core",
        "process",
        "backends",
        "llm_bars",
        "llm",
    ),
    "server": (
        "options",
        "config_file",
        "settings",
        "reference",
        "engine_reference",
        "errors",
        "kinds",
        "schemas",
        "metrics",
        "admission",
        "generation",
        "registry",
        "launching",
        "loading",
        "streaming",
        "routes",
        "middleware",
        "openapi",
        "app",
        "api_reference",
        "protocol",
        "serving",
        "doctor",
        "terminal",
        "parameters",
        "library",
        "cli",
    ),
}
"""Rooms of each package, foundations first. A module in none of them is an error: it has no place in the order."""

CROSSINGS = {
    "engine": frozenset[str](),
    "server": frozenset({"engine"}),
    "clients": frozenset({"seraph_client"}),
    "loadtests": frozenset[str](),
}
"""Top-level packages of this repository that each of them may import beside itself."""

OURS = frozenset({*CROSSINGS, "seraph_client", "benchmarks", "tests"})


def imported_names(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that `module` imports. `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield node.lineno, alias.name
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parents = module.split(".")[: -node.level]
                    base = ".".join([*parents, base] if base else parents)
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None where it may."""
    package, _, inner = module.partition(".")
    target, _, target_inner = imported.partition(".")
    if target not in OURS:
        return None
    if target != package:
        return None if target in CROSSINGS[package] else f"{package} must not import {target}"
    rooms = ROOMS.get(package)
    if rooms is None:
        return None
    room, target_room = inner.partition(".")[0], target_inner.partition(".")[0]
    if room not in rooms:
        return f"{room} has no place in the order of {package}"
    if target_room not in rooms:
        return f"{package} itself gathers all rooms: import from the room that defines {target_inner}"
    if rooms.index(target_room) > rooms.index(room):
        return f"{target_room} lies below {room}"
    return None


def violations(root: Path) -> list[str]:
    """One line for every import under `root` that runs the wrong way."""
    found = []
    for package in CROSSINGS:
        for path in sorted((root / package).rglob("*.py")):
            if path.name == "__init__.py":
                continue
            relative = path.relative_to(root)
            module = ".".join(relative.with_suffix("").parts)
            for line, name in imported_names(ast.parse(path.read_text(), str(path)), module):
                if why := complaint(module, name):
                    found.append(f"{relative}:{line}: imports {name}: {why}")
    return found


def unplaced(root: Path) -> list[str]:
    """Modules and packages that stand in no room."""
    return [
        f"{package}/{child.name}"
        for package, rooms in ROOMS.items()
        for child in sorted((root / package).iterdir())
        if (child.suffix == ".py" or (child / "__init__.py").exists())
        and child.stem != "__init__"
        and child.stem not in rooms
    ]


def test_every_import_runs_one_way() -> None:
    assert violations(ROOT) == []


def test_every_module_has_its_room() -> None:
    assert unplaced(ROOT) == []


def test_every_package_is_walked() -> None:
    """The test above would also pass on an empty folder."""
    for package in ("engine", "server"):
        assert sum(1 for _ in (ROOT / package).rglob("*.py")) > 5, package


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("engine/config.py", "from engine.llm import LLM", "llm lies below config"),
        ("engine/config.py", "import engine.models.spec", "models lies below config"),
        ("engine/kernels/a.py", "from engine import weights", "weights lies below kernels"),
        ("engine/kernels/a.py", "from engine import LLM", "engine itself gathers all rooms"),
        ("engine/kernels/a.py", "from ..weights import pack", "weights lies below kernels"),
        ("engine/kernels/a.py", "from .. import weights", "weights lies below kernels"),
        ("engine/cache/a.py", "def f():\n    import engine.core", "core lies below cache"),
        (
            "engine/cache/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from engine.scheduler.plan import Plan",
            "scheduler lies below cache",
        ),
        ("engine/cache/a.py", "import importlib\nimportlib.import_module('engine.core')", "core lies below cache"),
        ("engine/llm.py", "import server.app", "engine must not import server"),
        ("engine/llm.py", "from tests import tiny_gguf", "engine must not import tests"),
        ("engine/extra.py", "import engine.errors", "extra has no place"),
        ("server/errors.py", "from server.routes.chat import router", "routes lies below errors"),
        ("server/routes/chat.py", "from benchmarks import kernels", "server must not import benchmarks"),
        ("server/cli.py", "import seraph_client", "server must not import seraph_client"),
        ("clients/python/a.py", "from engine.request import Request", "clients must not import engine"),
        ("loadtests/a.py", "import server.settings", "loadtests must not import server"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, path: str, source: str, expected: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    (found,) = violations(tmp_path)
    assert found.startswith(path) and expected in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/llm.py", "import numpy, engine.core\nfrom engine.errors import ConfigError"),
        ("engine/kernels/a.py", "from engine.kernels.b import c\nfrom .b import c\nfrom . import b"),
        ("engine/cache/__init__.py", "from engine.llm import LLM"),
        ("server/app.py", "from engine import EngineConfig\nimport engine.llm\nimport server.routes.chat"),
        ("clients/python/a.py", "import seraph_client.errors, httpx"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


def test_a_module_without_a_room_is_found(tmp_path: Path) -> None:
    for path in ("engine/errors.py", "engine/odd.py", "engine/attic/__init__.py", "server/cli.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert unplaced(tmp_path) == ["engine/attic", "engine/odd.py"]
