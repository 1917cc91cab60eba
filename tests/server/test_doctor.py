"""`seraph doctor`: each problem provoked, and a report that comes whatever happens."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from engine.kernels import available_isas
from engine.weights import load_model
from server.doctor import environment, kernels, machine, models, report
from server.doctor.finding import Finding, State, ok, problem, warning
from tests.tiny_gguf import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
ISAS = available_isas()

CPUINFO = "processor\t: 0\nmodel name\t: Fancy 9000\nflags\t\t: fpu sse2 avx2 fma\n\nprocessor\t: 1\n"
MEMINFO = "MemTotal:        4000000 kB\nMemFree: 1 kB\nMemAvailable:    3000000 kB\n"


def by_subject(findings: Iterable[Finding]) -> dict[str, Finding]:
    found = list(findings)
    subjects = {one.subject: one for one in found}
    assert len(subjects) == len(found)
    return subjects


def states(findings: dict[str, Finding]) -> dict[str, State]:
    return {subject: one.state for subject, one in findings.items()}


# The machine


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "meminfo").write_text(MEMINFO)
    return tmp_path


def test_this_machine() -> None:
    found = by_subject(machine.examine())
    assert list(found) == ["system", "processor", "cores", "NUMA nodes", "memory"]
    assert found["cores"].detail.startswith(f"{len(os.sched_getaffinity(0))} usable of ")


def test_a_machine_with_limits(proc: Path) -> None:
    nodes = [[0, 1], [2]]
    found = by_subject(machine.examine(proc=proc, cpus=lambda: 0, memory=lambda: 2_000_000_000, nodes=lambda: nodes))
    assert found["processor"].detail == "Fancy 9000; avx2, fma"
    assert found["cores"].detail.endswith("the cgroup's quota")
    assert found["NUMA nodes"].detail == "2 of 2, 1 usable cores: a tensor-parallel rank each by default"
    assert found["memory"].detail == "4.1 GB, 3.1 GB available; the cgroup allows 2.0 GB"
    assert set(states(found).values()) == {State.OK}


def test_little_memory_is_a_warning(proc: Path) -> None:
    assert by_subject(machine.examine(proc=proc, memory=lambda: 500_000_000))["memory"].state is State.WARNING
    (proc / "meminfo").write_text(MEMINFO.replace("3000000", "300000"))
    assert by_subject(machine.examine(proc=proc, memory=lambda: 4_096_000_000))["memory"].state is State.WARNING


# The kernels


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SERAPH_") and name != "SERAPH_HOME":
            monkeypatch.delenv(name)


def test_the_kernels_of_this_machine() -> None:
    found = by_subject(kernels.examine())
    for isa in ISAS:
        assert found[f"build {isa}"].state is found[f"self-test {isa}"].state is State.OK
        assert "agree with the twin" in found[f"self-test {isa}"].detail
    assert found["choice"].detail.startswith(f"{ISAS[0]}, the best")


def answers(survey: list[tuple[str, bool, bool]], test: str = 'print(\'[{"name": "all"}]\')') -> list[str]:
    """A stand-in for the self-test: builds as (isa, installed, executable), and the code that tests one."""
    builds = json.dumps([{"isa": isa, "installed": i, "executable": e} for isa, i, e in survey])
    code = f"import os, sys\nif len(sys.argv) == 1: print({builds!r})\nelse:\n isa = sys.argv[1]\n {test}"
    return [sys.executable, "-c", code]


BOTH = [("avx512", True, True), ("avx2", True, True)]


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("os.kill(os.getpid(), 4)", "crashed with SIGILL: an instruction that this CPU lacks"),
        ("os.kill(os.getpid(), 11)", "crashed with SIGSEGV: a memory error"),
        ("sys.exit('no such symbol')", "failed with status 1: no such symbol"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
        ("print('nonsense')", "gave no answer"),
        ("print('[]')", "it checked nothing"),
        ("""print('[{"name": "a"}, {"name": "b", "error": "off by one"}]')""", "b: off by one"),
    ],
)
def test_a_build_that_fails_is_a_problem_of_that_build(test: str, said: str) -> None:
    command = answers(BOTH, f"""exec({test!r}) if isa == "avx512" else print('[{{"name": "all"}}]')""")
    found = by_subject(kernels.examine(command, seconds=1.0 if "sleep" in test else 60.0))
    broken = found["self-test avx512"]
    assert (broken.state, said in broken.detail) == (State.PROBLEM, True), broken.detail
    assert "--isa avx2" in broken.advice
    assert found["self-test avx2"].state is State.OK


def test_builds_that_are_not_installed_or_cannot_run_here() -> None:
    survey = [("avx512", True, False), ("avx2", False, True), ("neon", False, False), ("portable", True, True)]
    found = by_subject(kernels.examine(answers(survey)))
    assert found["build avx512"].detail == "installed; this CPU lacks its instructions"
    assert found["build avx2"].state is State.WARNING
    assert found["build neon"].state is State.OK
    assert found["choice"].detail.startswith("portable, the best")
    assert "self-test avx512" not in found and "self-test avx2" not in found  # they could not run


@pytest.mark.parametrize("asked", ["avx512", "neon"])
def test_an_isa_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("SERAPH_ISA", asked)
    survey = [("avx512", True, False), ("avx2", True, True), ("portable", True, True)]
    choice = by_subject(kernels.examine(answers(survey)))["choice"]
    assert choice.state is State.PROBLEM
    assert f"got '{asked}'" in choice.detail


@pytest.mark.parametrize(
    ("asked", "state", "said"),
    [
        ("avx512", State.OK, "avx512, by SERAPH_ISA"),
        ("avx2", State.WARNING, "avx512 is faster"),
        ("reference", State.WARNING, "hundreds of times slower"),
    ],
)
def test_the_choice_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, asked: str, state: State, said: str
) -> None:
    monkeypatch.setenv("SERAPH_ISA", asked)
    choice = by_subject(kernels.examine(answers(BOTH)))["choice"]
    assert (choice.state, said in choice.detail) == (state, True)


@pytest.mark.parametrize("command", [[sys.executable, "-c", "import os; os.abort()"], ["/no/such/program"]])
def test_without_a_survey_there_is_one_problem(command: list[str]) -> None:
    (finding,) = kernels.examine(command)
    assert finding.state is State.PROBLEM and "make build" in finding.advice


# The cache and the models


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_tiny_llama(tmp_path / "tiny.gguf")
    return tmp_path


def pack(home: Path) -> Path:
    model = load_model(str(home / "tiny.gguf"), home=home)
    model.close()
    return model.path


def test_a_cache_that_works(home: Path) -> None:
    found = by_subject(models.examine_cache(home, free=lambda path: 10**12))
    assert set(states(found).values()) == {State.OK}
    assert found["folder"].detail == str(home)
    later = by_subject(models.examine_cache(home / "not" / "yet", free=lambda path: 10**12))
    assert later["folder"].detail.endswith("made when it is needed")
    assert not (home / "not").exists()


@pytest.mark.parametrize("place", ["/proc/seraph", "/dev/null/seraph"])
def test_a_cache_that_cannot_be_written(place: str) -> None:
    folder = by_subject(models.examine_cache(Path(place)))["folder"]
    assert folder.state is State.PROBLEM
    assert "SERAPH_HOME" in folder.advice


def test_a_cache_without_room_and_with_leftovers(home: Path) -> None:
    path = pack(home)
    path.with_name(f"{path.name}.1.tmp").write_bytes(b"x" * 2_000_000)
    blobs = home / "hub" / "org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "sha256-0.part").write_bytes(b"x" * 3_000_000)
    found = by_subject(models.examine_cache(home, free=lambda path: 10_000_000))
    expected = {"folder": State.OK, "space": State.WARNING, "leftovers": State.WARNING, "unfinished": State.WARNING}
    assert states(found) == expected
    assert "10 MB free" in found["space"].detail
    assert f"2 MB: {path.name}.1.tmp" in found["leftovers"].detail.replace(str(path.parent) + "/", "")
    assert found["unfinished"].detail == "hf:org/name, 3 MB fetched"


def test_models_in_the_cache_and_by_name(home: Path) -> None:
    (none,) = models.examine(home=home)
    assert (none.subject, none.state) == ("models", State.OK)
    path = pack(home)
    source = str(home / "tiny.gguf")
    for sources in ((), ("tiny",), (source,), (str(path),)):
        (finding,) = models.examine(sources, home=home)
        assert (finding.state, "unchanged" in finding.detail) == (State.OK, True), finding
    (deep,) = models.examine(("tiny",), deep=True, home=home)
    assert (deep.state, "to the last bit" in deep.detail) == (State.OK, True)


def test_a_damaged_model_is_a_problem_and_an_outdated_one_a_warning(home: Path) -> None:
    path = pack(home)
    os.utime(home / "tiny.gguf", ns=(1, 1))
    (outdated,) = models.examine(home=home)
    assert (outdated.state, "has changed" in outdated.detail) == (State.WARNING, True)
    path.write_bytes(path.read_bytes()[:-100])
    (damaged,) = models.examine(home=home)
    assert (damaged.state, "truncated" in damaged.detail) == (State.PROBLEM, True)
    assert str(path) in damaged.advice


@pytest.mark.parametrize(
    ("source", "state", "said"),
    [
        ("no-such-model", State.PROBLEM, "unknown model 'no-such-model'"),
        ("/no/such/model.gguf", State.PROBLEM, "does not exist"),
        ("smollm2-135m-instruct", State.WARNING, "not in the cache"),
        ("hf:org/name", State.WARNING, "not in the cache"),
    ],
)
def test_models_that_are_not_there(home: Path, source: str, state: State, said: str) -> None:
    (finding,) = models.examine((source,), home=home)
    assert (finding.subject, finding.state, said in finding.detail) == (source, state, True)


# The environment


def test_an_environment_that_works() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    found = by_subject(environment.examine({"SERAPH_PORT": str(port)}))
    assert set(states(found).values()) == {State.OK}
    assert f"numpy {metadata.version('numpy')}" in found["packages"].detail


def test_names_that_mean_nothing_and_values_that_cannot_be() -> None:
    found = by_subject(environment.examine({"SERAPH_PROT": "1", "SERAPH_MAX_NUM_SEQS": "many", "PATH": "/bin"}))
    assert found["SERAPH_PROT"].state is State.WARNING
    assert found["settings"].state is State.PROBLEM
    assert "SERAPH_MAX_NUM_SEQS" in found["settings"].detail and "'many'" in found["settings"].detail
    assert "port" not in found


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = by_subject(environment.examine({"SERAPH_PORT": str(port)}))
    assert found["port"].state is State.WARNING
    assert f"Port {port} on 127.0.0.1 is in use" in found["port"].detail


def test_a_package_that_is_missing() -> None:
    found = by_subject(environment.examine({}, distributions=("numpy", "no-such-distribution")))
    assert found["packages"].state is State.PROBLEM
    assert found["packages"].detail == "not installed: no-such-distribution"


def test_every_package_that_the_server_needs_is_looked_at() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {Requirement(one).name for one in declared} - set(environment.DISTRIBUTIONS) == set()


# The report


def test_the_report_goes_on_past_sections_that_fail_or_hang() -> None:
    release = threading.Event()

    def fails() -> Iterable[Finding]:
        yield ok("first", "fine")
        raise RuntimeError("broken")

    def hangs() -> Iterable[Finding]:
        release.wait()
        return []

    wanted: dict[str, report.Section] = {"fails": fails, "hangs": hangs, "works": lambda: [ok("a", "fine")]}
    found = dict(report.examine(wanted, seconds=0.2))
    release.set()
    assert found["fails"][0].detail == "could not be examined: RuntimeError: broken"
    assert found["hangs"][0].detail == "did not finish within 0.2 s"
    assert found["works"] == [ok("a", "fine")]


@pytest.mark.parametrize(
    ("findings", "status", "said"),
    [
        ([ok("a", "fine")], 0, "no problems, no warnings"),
        ([ok("a", "fine"), warning("b", "slow", "Hurry.")], 0, "no problems, 1 warning"),
        ([problem("a", "broken", "Mend it."), problem("b", "lost", "Find it.")], 1, "2 problems, no warnings"),
    ],
)
def test_the_exit_status_and_both_forms(findings: list[Finding], status: int, said: str) -> None:
    written: list[str] = []
    assert report.run({"part": lambda: findings}, json=False, write=written.append) == status
    text = "\n".join(written)
    assert text.splitlines()[0] == "part" and text.endswith(said)
    for one in findings:
        assert f"{report.MARKS[one.state]} " in text and one.detail in text and one.advice in text
    written.clear()
    assert report.run({"part": lambda: findings}, json=True, write=written.append) == status
    parsed: dict[str, Any] = json.loads(written[0])
    assert [one["detail"] for one in parsed["findings"]] == [one.detail for one in findings]
    assert parsed["counts"]["problem"] == sum(one.state is State.PROBLEM for one in findings)


def test_long_lines_are_wrapped_and_lose_nothing() -> None:
    detail = " ".join(f"word{i}" for i in range(100))
    text = report.table("part", [warning("subject", detail, detail)])
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert " ".join(text.split()).count(detail) == 2


def test_the_command_on_a_machine_with_troubles(home: Path) -> None:
    path = pack(home)
    path.write_bytes(path.read_bytes()[:-1])
    trouble = {"SERAPH_HOME": str(home), "SERAPH_ISA": "neon", "SERAPH_PORTT": "1", "SERAPH_PORT": "0"}
    command = [sys.executable, "-m", "server.cli", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **trouble})
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    bad = {(one["section"], one["subject"]): one["state"] for one in answer["findings"] if one["state"] != "ok"}
    assert bad[("models", "tiny")] == bad[("kernels", "choice")] == "problem"
    assert bad[("environment", "SERAPH_PORTT")] == "warning"
    assert "Traceback" not in done.stderr
