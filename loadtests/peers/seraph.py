"""Ours: the server over HTTP, and the engine without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.peers import serving
from loadtests.peers.plan import OURS, Task
from loadtests.peers.processes import output_of
from loadtests.peers.systems import Environment, Figures, Place, Setting

ROOT = Path(__file__).parents[2]


class Seraph:
    name = OURS
    title = "Seraph"
    environments: Mapping[str, Environment] = {}  # this one
    over_http = False

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        command = [place.python, "-m", "server.cli", "pull", serving.MODEL]
        output_of(command, log=place.logs / "seraph-pull.log", seconds=600, folder=ROOT)

    def settings(self, family: str, place: Place) -> Sequence[Setting]:
        return (Setting("its defaults, KV memory for 32,768 tokens"),)

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        if over_http or tasks[0].kind == "serve":
            return serving.measure(self._server(place), tasks)
        return {task.name: self._offline(task, place) for task in tasks}

    def _server(self, place: Place) -> serving.Server:
        flags = ["--port", "{port}", "--log-level", "warning", "--kv-cache-tokens", "32768"]
        command = [place.python, "-m", "server.cli", "serve", serving.MODEL, *flags]
        return serving.Server(command, {}, place.logs / "seraph.log", folder=ROOT)

    def _offline(self, task: Task, place: Place) -> Figures:
        sizes = ["--streams", str(task.streams), "--prompt", str(task.prompt or 16), "--tokens", str(task.tokens)]
        command = [place.python, "-m", "benchmarks.offline", task.kind, *sizes]
        log = place.logs / f"seraph-{task.name}.log"
        figures: Figures = json.loads(output_of(command, log=log, seconds=task.seconds, folder=ROOT))
        return figures
