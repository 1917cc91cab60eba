"""Results of a small run, made up, and a system that measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loadtests.peers.plan import OURS, Task
from loadtests.peers.records import Choice, Failure, Header, Measurement, Results
from loadtests.peers.systems import Environment, Figures, Place, Setting

PEERS = ("llamacpp", "openvino", "vllm")


def header(**plan: object) -> Header:
    return Header(
        machine={"processor": "A processor", "memory": "24.0 GiB"},
        plan={"peers": list(PEERS), "rounds": 3, "whole": 3, "concurrency": [1, 32], "contexts": [128, 8064], **plan},
        versions={OURS: "Seraph abc1234", "llamacpp": "llama.cpp b1", "openvino": "OpenVINO", "vllm": "vLLM"},
    )


def results() -> Results:
    """Three rounds in which ours is 3, 2 and 4 times as fast as any peer; vLLM's last round failed."""
    found = Results(header())
    for number, factor in enumerate((3.0, 2.0, 4.0)):
        for peer in PEERS:
            for system, rate in ((OURS, 100.0 * factor), (peer, 100.0)):
                if (number, system) == (2, "vllm"):
                    continue
                for task in ("prefill-512", "decode-1", "decode-32", "context-128", "context-8064"):
                    figures = {"tokens_per_second": rate}
                    if system == OURS and task.startswith("context"):
                        figures |= {"share": factor / 5, "read_gbs": 40.0}
                    found.add(measurement(number, peer, system, task, figures))
                serve = {"start_seconds": 100 / rate, "memory_mb": 500.0}
                for n in (1, 32):
                    serve |= {f"tokens_per_second@{n}": rate * n, f"ttft@{n}": 0.01 * n, f"tpot@{n}": 1 / rate}
                found.add(measurement(number, peer, system, "serve", serve))
    found.add(
        Choice(pair="vllm", system="vllm", family="serve", chosen="eager", trials={"compiled": 0.0, "eager": 50.0})
    )
    found.add(Failure(pair="vllm", system="vllm", what="serve", message="ended with status 1", log="no | memory"))
    return found


def measurement(number: int, pair: str, system: str, task: str, figures: Mapping[str, float]) -> Measurement:
    return Measurement(round=number, pair=pair, system=system, task=task, setting="default", figures=figures)


class FakeSystem:
    """Answers what `answer` returns for a task, and remembers what it was asked."""

    title = "Fake"
    environments: Mapping[str, Environment] = {}

    def __init__(
        self,
        name: str,
        answer: Callable[[Task, str], Figures],
        *,
        labels: Sequence[str] = ("default",),
        over_http: bool = False,
    ) -> None:
        self.name, self.answer, self.labels, self.over_http = name, answer, labels, over_http
        self.asked: list[tuple[str, str]] = []

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        raise AssertionError("nothing to prepare")

    def settings(self, family: str, place: Place) -> Sequence[Setting]:
        return [Setting(label) for label in self.labels]

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        self.asked += [(task.name, setting.label) for task in tasks]
        return {task.name: self.answer(task, setting.label) for task in tasks}
