"""Ours: the server over HTTP, and the engine without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.peers import serving
from loadtests.peers.llamacpp import requantized
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
        files = {"Q4_1": serving.MODEL}
        if requantized(place).exists():
            files["Q4_0"] = str(requantized(place))
        return tuple(
            Setting(f"{name}, {dtype} keys and values, no speculation", {"model": model, "kv_cache_dtype": dtype})
            for name, model in files.items()
            for dtype in ("bf16", "int8")
        )

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        if over_http or tasks[0].kind == "serve":
            return serving.measure(self._server(setting, place), tasks)
        return {task.name: self._offline(task, setting, place) for task in tasks}

    def _server(self, setting: Setting, place: Place) -> serving.Server:
        flags = ["--port", "{port}", "--log-level", "warning", "--speculation", "off", "--kv-cache-tokens", "32768"]
        flags += ["--kv-cache-dtype", setting.options["kv_cache_dtype"]]
        flags += ["--served-model-name", serving.MODEL]
        command = [place.python, "-m", "server.cli", "serve", setting.options["model"], *flags]
        return serving.Server(command, {}, place.logs / "seraph.log", folder=ROOT)

    def _offline(self, task: Task, setting: Setting, place: Place) -> Figures:
        sizes = ["--streams", str(task.streams), "--prompt", str(task.prompt or 16), "--tokens", str(task.tokens)]
        sizes += ["--model", setting.options["model"], "--kv-cache-dtype", setting.options["kv_cache_dtype"]]
        command = [place.python, "-m", "benchmarks.offline", task.kind, *sizes]
        log = place.logs / f"seraph-{task.name}.log"
        figures: Figures = json.loads(output_of(command, log=log, seconds=task.seconds, folder=ROOT))
        return figures
