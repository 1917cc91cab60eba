from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from loadtests.peers import beside, beside_report, records
from loadtests.peers.__main__ import main
from loadtests.peers.beside import THEIRS
from loadtests.peers.plan import OURS, Task
from loadtests.peers.processes import SystemFailure
from loadtests.peers.records import Header, Results
from loadtests.peers.serving import MODEL, Server
from loadtests.peers.systems import Figures, Place
from server.launching import _vllm_kv_bytes
from server.settings import resolve

PLACE = Place(python=Path("python"), gguf=Path("x.gguf"), models=Path("models"), logs=Path("logs"), threads=2)
SERVERS = {OURS: Server(["ours"], {}, Path("a.log")), THEIRS: Server(["theirs"], {}, Path("b.log"))}
PAGE = "# Performance\n\nWords.\n\n## Serving\n\nMore.\n\n## Settings\n\nOf all.\n\n## Again\n\nSo.\n"


def header() -> Header:
    return Header(
        machine={"processor": "A processor", "memory": "24.0 GiB"},
        plan={"peers": [THEIRS], "rounds": 3, "concurrency": [32, 128], "model": "m"},
        versions={OURS: "Seraph abc1234 over vLLM 1", THEIRS: "vLLM 1's own server"},
    )


def figures(rate: float, ttft: float) -> Figures:
    found = {"start_seconds": 30.0, "memory_mb": 4000.0}
    for n in (32, 128):
        found |= {f"tokens_per_second@{n}": rate, f"ttft@{n}": ttft, f"tpot@{n}": 0.1, f"cpu_seconds@{n}": 1e-4}
        found |= {f"client_cpus@{n}": 0.02, f"idle_cpus@{n}": 0.01}
    return found


class Measure:
    """Answers with what each system is said to reach, and remembers who was first."""

    def __init__(self, *rates: tuple[float, float]) -> None:
        self.rates, self.first = list(rates), list[str]()

    def __call__(self, servers: Mapping[str, Server], task: Task) -> Mapping[str, Figures]:
        assert servers == SERVERS and task.concurrency == beside.CONCURRENCY
        self.first.append(next(iter(servers)))
        ours, theirs = self.rates.pop(0)
        return {OURS: figures(ours, 10 / ours), THEIRS: figures(theirs, 10 / theirs)}


def measured(path: Path, *rates: tuple[float, float]) -> Results:
    found = records.resume(path, header())
    assert beside.run(
        SERVERS,
        path,
        found,
        rounds=len(rates),
        seconds=9,
        measure=Measure(*rates),
        say=list[str]().append,
        clock=lambda: 0,
    )
    return found


def test_both_vllms_are_told_the_same() -> None:
    """What `seraph serve` makes of its flags is what vLLM's own server is given, but for what concerns HTTP."""
    words = [str(word) for word in beside.ours(PLACE, Path("folder")).command[3:]]
    assert words[:2] == ["serve", "folder"]
    flags = {
        name.removeprefix("--").replace("-", "_"): value for name, value in zip(*[iter(words[2:])] * 2, strict=True)
    }
    several = ("served_model_name", "vllm_arg")
    settings = resolve(
        {"model": ["folder"], **{name: [value] if name in several else value for name, value in flags.items()}}
        | {"port": "1"},
        {},
    )
    assert settings.uses_vllm
    options = settings.vllm_options(Path("folder"), MODEL, pooling=False, kv_cache_bytes=_vllm_kv_bytes(settings))
    told = [str(word) for word in beside.theirs(PLACE, Path("folder")).command[3:]]
    of_http = {"--host", "127.0.0.1", "--port", "{port}", "--uvicorn-log-level", "warning"}
    assert sorted(set(told) - of_http) == sorted(options.command_line())
    assert beside.ours(PLACE, Path("folder")).environment == beside.theirs(PLACE, Path("folder")).environment


def test_rounds_alternate_and_go_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first, said = Measure((100.0, 100.0), (99.0, 100.0)), list[str]()
    ticks = iter(range(100))
    found = records.resume(path, header())
    assert not beside.run(
        SERVERS, path, found, rounds=4, seconds=5, measure=first, say=said.append, clock=lambda: next(ticks)
    )
    assert first.first == [OURS, THEIRS]
    assert "the same command goes on" in said[-1]
    later = Measure((98.0, 100.0), (100.0, 99.0))
    again = records.resume(path, header())
    assert beside.run(
        SERVERS, path, again, rounds=4, seconds=99, measure=later, say=list[str]().append, clock=lambda: 0
    )
    assert later.first == [OURS, THEIRS]
    assert again == records.read(path)
    keys = [(m.round, m.system) for m in again.measurements]
    assert len(keys) == len(set(keys)) == 8


def test_the_part_tells_ratios_with_their_intervals(tmp_path: Path) -> None:
    part = beside_report.section(measured(tmp_path / "r.jsonl", (99.0, 100.0), (100.0, 100.0), (100.0, 99.0)))
    for line in (
        "| output tokens per second, 32 streams | 0.97x | 1.000x (0.975 to 1.025, 3 pairs) | reached |",
        "| time to first token, vLLM's by Seraph's, 128 streams | 0.97x | 1.000x (0.975 to 1.025, 3 pairs) | reached |",
        "| Seraph abc1234 over vLLM 1 | 100 (99.0 to 100) | 100 (99.0 to 100) |",
        "| vLLM 1's own server | 100 (100 to 101) | 100 (100 to 101) |",
    ):
        assert line in part.splitlines(), line
    assert "Of a CPU the client took 2% at most, the server that was not asked 1%." in part


def test_the_lower_end_is_what_counts(tmp_path: Path) -> None:
    rows = beside_report.section(measured(tmp_path / "r.jsonl", (90.0, 100.0), (110.0, 100.0), (105.0, 100.0)))
    assert rows.count("| missed |") == 4
    one = beside_report.section(measured(tmp_path / "one.jsonl", (100.0, 100.0)))
    assert one.count("not measured") == 4


def test_the_part_has_its_place_on_the_page(tmp_path: Path) -> None:
    part = beside_report.section(measured(tmp_path / "r.jsonl", (99.0, 100.0), (100.0, 100.0)))
    page = beside_report.put(PAGE, part)
    assert page.startswith("# Performance\n\nWords.\n\n## Serving\n\nMore.\n\n## Over vLLM")
    assert page.endswith("\n\n## Settings\n\nOf all.\n\n## Again\n\nSo.\n")
    assert beside_report.section_of(page) == part
    assert beside_report.put(page, part) == page
    other = beside_report.section(measured(tmp_path / "o.jsonl", (50.0, 100.0), (50.0, 100.0)))
    assert beside_report.put(page, other) == beside_report.put(PAGE, other)
    assert beside_report.section_of(PAGE) == ""
    assert beside_report.put("", part) == part
    assert beside_report.section_of(f"# Performance\n\n{part}") == part


def test_the_page_is_written_from_these_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(tmp_path / "beside-vllm.jsonl", (99.0, 100.0), (100.0, 100.0))
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    assert main(["report", "--results", str(tmp_path / "peers.jsonl"), "--page", str(page)]) == 0
    assert (
        beside_report.put(PAGE, beside_report.section(records.read(tmp_path / "beside-vllm.jsonl"))) == page.read_text()
    )
    assert "wrote" in capsys.readouterr().out


def test_an_environment_without_vllm(tmp_path: Path) -> None:
    place = Place(python=Path("/bin/false"), gguf=Path(), models=tmp_path, logs=tmp_path / "logs", threads=2)
    with pytest.raises(SystemFailure, match="false ended with status 1"):
        beside.vllm_version(place)
