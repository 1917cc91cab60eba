from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loadtests.peers import records, runner
from loadtests.peers.plan import OURS, Task, tasks, turns
from loadtests.peers.processes import SystemFailure
from loadtests.peers.runner import Runner
from loadtests.peers.systems import Figures, Place
from tests.loadtests.peers.fixtures import FakeSystem, header

SERVE, PREFILL, *_ = tasks((1,), ())


def rate(value: float) -> Callable[[Task, str], Figures]:
    return lambda task, label: {"tokens_per_second": value}


def broken(task: Task, label: str) -> Figures:
    raise SystemFailure("it broke", "the last line")


class Bench:
    """A run of fake systems against results in `path`."""

    def __init__(self, path: Path, *peers: FakeSystem, ours: FakeSystem | None = None, seconds: float = 1e6) -> None:
        self.ours = ours or FakeSystem(OURS, rate(300.0))
        self.peers = peers
        systems = {system.name: system for system in (self.ours, *peers)}
        place = Place(python=Path(), gguf=Path(), models=Path(), logs=Path(), threads=1)
        self.said: list[str] = []
        self.results = records.resume(path, header())
        self.runner = Runner(
            systems,
            dict.fromkeys(systems, place),
            path,
            self.results,
            seconds=seconds,
            trials=2,
            say=self.said.append,
            clock=iter(range(10**6)).__next__,
        )

    def run(self, rounds: int = 2) -> bool:
        return self.runner.run(turns(runner.groups(self.peers, (SERVE, PREFILL)), rounds))


def test_everything_is_measured_and_written_down(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "r.jsonl", FakeSystem("vllm", rate(100.0), over_http=True))
    assert bench.run(rounds=3)
    found = records.read(tmp_path / "r.jsonl")
    assert found == bench.results
    assert [(m.round, m.system, m.task) for m in found.measurements[:6]] == [
        (0, OURS, "serve"),
        (0, OURS, "prefill-512"),
        (0, "vllm", "serve"),
        (0, "vllm", "prefill-512"),
        (1, "vllm", "serve"),
        (1, "vllm", "prefill-512"),
    ]
    # The first start is not counted.
    assert bench.ours.asked == [("serve", "default")] + 3 * [("serve", "default"), ("prefill-512", "default")]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Bench(path, FakeSystem("vllm", rate(100.0)), seconds=4)
    assert not first.run()
    assert "the same command goes on" in first.said[-1]
    before = len(records.read(path).measurements)
    second = Bench(path, FakeSystem("vllm", rate(100.0)))
    assert second.run()
    keys = [(m.round, m.pair, m.system, m.task) for m in second.results.measurements]
    assert 0 < before < len(keys) == len(set(keys)) == 8


def test_the_fastest_setting_is_taken_once(tmp_path: Path) -> None:
    speeds = {"slow": 50.0, "fast": 200.0, "broken": 0.0}

    def answer(task: Task, label: str) -> Figures:
        return broken(task, label) if label == "broken" else {"tokens_per_second": speeds[label]}

    peer = FakeSystem("vllm", answer, labels=tuple(speeds))
    bench = Bench(tmp_path / "r.jsonl", peer)
    bench.run()
    assert {m.setting for m in bench.results.measurements if m.system == "vllm"} == {"fast"}
    assert [(c.family, c.chosen, c.trials) for c in bench.results.choices] == [
        (family, "fast", {"slow": 50.0, "fast": 200.0, "broken": 0.0}) for family in ("serve", "prefill")
    ]
    again = FakeSystem("vllm", answer, labels=tuple(speeds))
    Bench(tmp_path / "r.jsonl", again).run(rounds=3)
    assert {label for _, label in again.asked} == {"fast"}


def test_a_peer_that_fails_is_reported_and_skipped(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "r.jsonl", FakeSystem("vllm", broken), FakeSystem("llamacpp", rate(100.0)))
    assert not bench.run(rounds=9)
    assert len(bench.results.failures) == runner.MAX_FAILURES
    assert bench.results.failures[0].message == "it broke" and bench.results.failures[0].log == "the last line"
    assert "    | the last line" in bench.said and "    vllm is skipped from here on" in bench.said
    of_other = [m for m in bench.results.measurements if m.pair == "llamacpp"]
    assert len(of_other) == 9 * 2 * 2


def test_failures_that_are_not_in_a_row_skip_nothing(tmp_path: Path) -> None:
    count = iter(range(100))

    def now_and_then(task: Task, label: str) -> Figures:
        return broken(task, label) if next(count) % 3 == 2 else {"tokens_per_second": 1.0}

    bench = Bench(tmp_path / "r.jsonl", FakeSystem("vllm", now_and_then))
    assert not bench.run(rounds=6)
    assert len(bench.results.failures) > runner.MAX_FAILURES
    assert max(m.round for m in bench.results.measurements if m.system == "vllm") == 5


def test_a_peer_that_cannot_be_installed_is_skipped(tmp_path: Path) -> None:
    peer = FakeSystem("vllm", rate(1.0))
    bench = Bench(tmp_path / "r.jsonl", peer)
    bench.runner.fail("vllm", SystemFailure("pip ended with status 1", "no such version"), "installing it")
    assert not bench.run()
    assert peer.asked == [] and bench.ours.asked == []
    assert bench.results.failures[0].what == "installing it"
