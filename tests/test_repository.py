"""What the repository promises about itself: commands, locks, container, and what must not be in it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.settings import resolve

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("runtime", "build", "test", "load", "bench")
CLIENT_LOCKS = ("clients/langchain", "clients/litellm", "clients/instructor")
"""Of environments that hold nothing else."""
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked_files() -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


# Commands


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_has_the_documented_targets() -> None:
    expected = "serve test test-full test-clients check format bench bench-peers load docs lock preflight clean help"
    assert set(expected.split()) <= make_targets()


def test_make_help_lists_every_target() -> None:
    printed = subprocess.run(["make", "-s", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^  make ([a-z-]+) +\S", printed, re.MULTILINE)) == make_targets()


def documents() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".md"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_only_what_exists(path: Path) -> None:
    text = path.read_text()
    commands = re.findall(r"^(?: {4,}|`{0,3})make ([a-z-]+)|`make ([a-z-]+)", text, re.MULTILINE)
    assert {a or b for a, b in commands} <= make_targets()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_starts_with_two_commands() -> None:
    commands = re.findall(r"^ {4}(\S+ \S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands[:2] == ["make serve", "make test"]


def test_the_architecture_page_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [
        child.stem
        for package in ("engine", "server")
        for child in (ROOT / package).iterdir()
        if (child.suffix == ".py" or (child / "__init__.py").exists()) and child.stem != "__init__"
    ]
    assert [room for room in rooms if f"| `{room}` |" not in text] == []


def test_continuous_integration_runs_check_and_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert any(line.startswith("make check test") for line in lines)


# Dependencies


def locked(name: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a lock file with its hashes."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            yield Requirement(requirement), [value.strip() for value in hashes]


@pytest.mark.parametrize("name", LOCKS + CLIENT_LOCKS)
def test_locks_pin_and_hash_everything(name: str) -> None:
    requirements = list(locked(name))
    assert requirements
    for requirement, hashes in requirements:
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, requirement
        assert requirement.url is None, requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement


@pytest.mark.parametrize("name", LOCKS + CLIENT_LOCKS)
def test_locks_name_no_index(name: str) -> None:
    """Where packages come from is the installing machine's affair."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert re.findall(r"^\s*(?:-[a-z]|--(?!hash=)\S+)|\w+://", text, re.MULTILINE) == []


def test_locks_agree_with_each_other() -> None:
    """All of them go into one environment, so no two may pin different versions of a package."""
    pins: dict[str, dict[str, set[str]]] = defaultdict(dict)
    for name in LOCKS:
        for requirement, _ in locked(name):
            pins[canonicalize_name(requirement.name)].setdefault(name, set()).add(str(requirement.specifier))
    versions = {package: set(map(frozenset, by_lock.values())) for package, by_lock in pins.items()}
    assert {package: pinned for package, pinned in versions.items() if len(pinned) > 1} == {}


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("runtime", PYPROJECT["project"]["dependencies"]),
        ("build", PYPROJECT["dependency-groups"]["build"] + PYPROJECT["build-system"]["requires"]),
        ("test", PYPROJECT["dependency-groups"]["test"] + PYPROJECT["dependency-groups"]["dev"]),
        ("load", PYPROJECT["dependency-groups"]["load"]),
        ("bench", PYPROJECT["dependency-groups"]["bench"]),
        *((name, PYPROJECT["dependency-groups"][name.rpartition("/")[2]]) for name in CLIENT_LOCKS),
    ],
)
def test_locks_satisfy_what_is_declared(name: str, declared: list[str]) -> None:
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin, _ in locked(name)}
    for requirement in map(Requirement, declared):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None and requirement.specifier.contains(version), f"{requirement}: locked at {version}"


def test_the_lock_of_node_s_packages() -> None:
    """Every package has its hash and no address; npm's own setting keeps addresses out."""
    folder = ROOT / "clients" / "examples" / "node"
    lock = json.loads((folder / "package-lock.json").read_text())["packages"]
    declared = json.loads((folder / "package.json").read_text())["dependencies"]
    assert lock[""]["dependencies"] == declared
    packages = {name: package for name, package in lock.items() if name}
    assert {f"node_modules/{name}" for name in declared} <= packages.keys()
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert all("resolved" not in package for package in packages.values())
    assert (folder / ".npmrc").read_text() == "omit-lockfile-registry-resolved=true\n"


def test_no_deep_learning_framework_is_needed() -> None:
    names = {canonicalize_name(requirement.name) for name in LOCKS for requirement, _ in locked(name)}
    assert names.isdisjoint({"torch", "transformers", "tensorflow", "jax"})


def test_declared_dependencies_have_lower_bounds_only() -> None:
    """An upper bound here would keep the server out of environments that other engines pin."""
    for requirement in map(Requirement, PYPROJECT["project"]["dependencies"]):
        assert [specifier.operator for specifier in requirement.specifier] == [">="], requirement


# What must not be in the repository

_HOSTS = ("pypi" + ".org", "python" + "hosted.org", "npm" + "js.org", "deb.debian" + ".org", "conda" + ".anaconda.org")
_PATHS = (
    "/work" + "/main",
    "/work" + "/shared",
    "/work" + "/.library",
    "/tmp" + "/dev/",
    "/tmp" + "/peers",
    "/root" + "/",
)
FORBIDDEN = re.compile("|".join(map(re.escape, _HOSTS + _PATHS)) + r"|\bissues? #?\d+\b", re.IGNORECASE)


@pytest.mark.parametrize(
    "text", [f"see https://{_HOSTS[0]}/x", f"cd {_PATHS[0]}", "as issue " + "12 asks", "Issue " + "#3"]
)
def test_forbidden_words_are_recognised(text: str) -> None:
    assert FORBIDDEN.search(text)


def test_no_registry_host_or_machine_path_is_tracked() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # binary
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in FORBIDDEN.finditer(text)]
    assert found == []


def test_no_large_file_is_tracked() -> None:
    limit = 8 << 20
    assert [str(path.relative_to(ROOT)) for path in tracked_files() if path.stat().st_size > limit] == []


# The container


def dockerfile_stages() -> list[list[tuple[str, str]]]:
    """Instructions of each build stage as (name, arguments), comments and line continuations removed."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction, _, arguments = line.strip().partition(" ")
            if instruction == "FROM":
                stages.append([])
            if stages:
                stages[-1].append((instruction, arguments.strip()))
    return stages


def stage_named(name: str) -> list[tuple[str, str]]:
    """The instructions of the stage that `docker build --target NAME` builds; the last one without a name."""
    stages = dockerfile_stages()
    if not name:
        return stages[-1]
    (found,) = (stage for stage in stages if stage[0][1].endswith(f" AS {name}"))
    return found


def only(instruction: str, target: str = "") -> str:
    """The arguments of the one such instruction of a target."""
    (arguments,) = (arguments for name, arguments in stage_named(target) if name == instruction)
    return arguments


def environment_of(target: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(only("ENV", target)))


TARGETS = ("", "gpu")


def test_the_container_is_built_in_stages_and_ships_no_compiler() -> None:
    stages = dockerfile_stages()
    assert len(stages) >= 2
    assert any(name == "RUN" and "g++" in arguments for name, arguments in stages[0])
    assert not any("apt-get" in arguments or "pip" in arguments for _, arguments in stages[-1])
    assert any(name == "COPY" and "--from=build" in arguments for name, arguments in stages[-1])


@pytest.mark.parametrize("target", TARGETS)
def test_the_container_runs_as_nobody_special(target: str) -> None:
    user, _, group = [arguments for name, arguments in stage_named(target) if name == "USER"][-1].partition(":")
    assert user.isdigit() and group.isdigit() and int(user) > 0 and int(group) > 0  # numeric: Kubernetes can verify it


@pytest.mark.parametrize("target", TARGETS)
def test_the_container_serves_and_keeps_its_models(target: str) -> None:
    assert only("EXPOSE", target) == "8000"
    assert json.loads(only("ENTRYPOINT", target)) == ["seraph", "serve", "--host", "0.0.0.0"]
    assert only("STOPSIGNAL", target) == "SIGTERM"
    assert environment_of(target)["SERAPH_HOME"] == only("VOLUME", target) == only("WORKDIR", target)


def test_the_container_of_no_target_needs_no_vllm() -> None:
    assert stage_named("")[0][1].startswith("python:") and " AS " not in stage_named("")[0][1]
    assert "SERAPH_ENGINE" not in environment_of("")


def test_the_container_for_gpus_computes_with_vllm() -> None:
    """On vLLM's own image, whose packages stay, with a wheel that was built for the Python in it."""
    text = (ROOT / "Dockerfile").read_text()
    (image,) = re.findall(r"^ARG VLLM_IMAGE=(\S+)$", text, re.MULTILINE)
    name, _, tag = image.partition(":")
    assert name == "vllm/vllm-openai" and re.fullmatch(r"v\d+\.\d+\.\d+", tag), "a release, and no moving tag"
    (declared,) = map(Requirement, PYPROJECT["project"]["optional-dependencies"]["vllm"])
    assert declared.specifier.contains(tag.removeprefix("v"))
    for stage in ("gpu-build", "gpu"):
        assert stage_named(stage)[0] == ("FROM", f"${{VLLM_IMAGE}} AS {stage}")
    assert environment_of("gpu")["SERAPH_ENGINE"] == "vllm"
    assert resolve({}, environment_of("gpu")).uses_vllm
    assert environment_of("gpu")["HOME"] == only("VOLUME", "gpu")  # where vLLM may write
    installs = [arguments for name, arguments in stage_named("gpu") if name == "RUN" and "pip install" in arguments]
    assert len(installs) == 1 and "from=gpu-build" in installs[0] and "--constraint /tmp/vllm.txt" in installs[0]
    assert not any("apt-get" in arguments for _, arguments in stage_named("gpu"))


def test_the_container_context_holds_what_a_wheel_needs() -> None:
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = set(PYPROJECT["tool"]["scikit-build"]["wheel"]["packages"])
    needed = packages | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "requirements"}
    assert admitted == needed
    assert all((ROOT / name).exists() for name in needed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_container_health_check_asks_the_server(status: int, healthy: bool, target: str) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        check = only("HEALTHCHECK", target).partition("CMD ")[2].replace("8000", str(server.server_port))
        _, *arguments = json.loads(check)
        code = subprocess.run([sys.executable, *arguments], timeout=30).returncode
        server.shutdown()
        thread.join()
    assert asked == ["/health/live"]
    assert (code == 0) is healthy


# The wheel


@pytest.mark.full
def test_the_wheel_holds_the_packages_and_no_sources(tmp_path: Path) -> None:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation"]
    where = [f"--wheel-dir={tmp_path}", f"--config-settings=build-dir={tmp_path}/build"]
    subprocess.run([*pip_wheel, *where, str(ROOT)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"engine", "server"}
    for name in ("engine/py.typed", "engine/weights/catalog.toml", "server/py.typed", "server/cli.py"):
        assert name in names
    assert any(name.startswith("engine/kernels/_portable.") and name.endswith(".so") for name in names)
    assert [name for name in names if "csrc" in name or "__pycache__" in name] == []
