"""OpenVINO GenAI: its continuous batching pipeline, offline, through a driver in its own environment.

Its model is the GGUF file itself, or an intermediate representation in 8 or 4 bits that optimum-intel makes of the
Hugging Face folder, in an environment for that alone.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.peers.plan import Task, first_seed, num_requests
from loadtests.peers.processes import Child, SystemFailure, output_of, resident_mb, running
from loadtests.peers.serving import random_prompt
from loadtests.peers.systems import Environment, Figures, Place, Setting
from loadtests.peers.vllm import make_folder
from loadtests.throughput import prompt

DRIVER = Path(__file__).parent / "inside" / "openvino_driver.py"
CACHE_GIB = 2
CONVERT = "openvino_convert"
FORMATS: Mapping[str, Sequence[str]] = {
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"),
}


class OpenVino:
    name = "openvino"
    title = "OpenVINO GenAI 2026.4.1 (offline)"
    environments: Mapping[str, Environment] = {
        "openvino": Environment(requirements=("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")),
        CONVERT: Environment(
            requirements=(
                *("optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"),
                *("openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),
            ),
            unwanted=("torchvision",),  # as beside vLLM
        ),
    }
    over_http = False

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        convert = pythons[CONVERT]
        folder = make_folder(place)
        for name, flags in FORMATS.items():
            made = place.models / f"openvino_{name}"
            if made.exists():
                continue
            partial = made.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            task = ["--model", folder, "--task", "text-generation-with-past"]
            command = [convert.parent / "optimum-cli", "export", "openvino", *task, *flags, partial]
            environment = {"HF_HUB_OFFLINE": "1"}
            output_of(command, log=place.logs / f"openvino-{name}.log", seconds=900, environment=environment)
            partial.rename(made)

    def settings(self, family: str, place: Place) -> Sequence[Setting]:
        converted = [name for name in FORMATS if (place.models / f"openvino_{name}").exists()]
        return (
            Setting("GGUF Q4_1", {"model": str(place.gguf)}),
            *(Setting(f"IR {name}", {"model": str(place.models / f"openvino_{name}")}) for name in converted),
        )

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        if over_http:
            raise SystemFailure("OpenVINO GenAI is measured offline")
        figures: dict[str, Figures] = {}
        for task in tasks:
            command = [place.python, DRIVER, setting.options["model"], str(CACHE_GIB)]
            log = place.logs / f"openvino-{task.name}.log"
            begin = time.perf_counter()
            with running(command, log=log, seconds=task.seconds, piped=True) as child:
                _ask(child, _chats(task, 1, 1, tokens=1, seed=1))  # also touches all weights for the first time
                start_seconds = time.perf_counter() - begin
                if task.kind == "serve":
                    figures[task.name] = {"start_seconds": start_seconds, **_serve(child, task)}
                else:
                    figures[task.name] = _ask(child, _tokens(task))
        return figures


def _serve(child: Child, task: Task) -> dict[str, float]:
    figures: dict[str, float] = {}
    for streams in task.concurrency:
        asked = _chats(task, streams, num_requests(streams), task.tokens, first_seed(task, streams))
        figures |= {f"{name}@{streams}": value for name, value in _ask(child, asked).items()}
    return {"memory_mb": resident_mb(child.process.pid), **figures}


def _chats(task: Task, streams: int, requests: int, tokens: int, seed: int) -> Mapping[str, object]:
    prompts = [prompt(seed + number) for number in range(requests)]
    return {"kind": "serve", "streams": streams, "tokens": tokens, "prompts": prompts}


def _tokens(task: Task) -> Mapping[str, object]:
    tokens = 1 if task.kind == "prefill" else task.tokens
    prompts = [random_prompt(task, number) for number in range(task.streams)]
    return {"kind": task.kind, "tokens": tokens, "prompts": prompts}


def _ask(child: Child, task: Mapping[str, object]) -> dict[str, float]:
    """Send the driver a task; its figures. Raises SystemFailure where it dies of it."""
    child.send(json.dumps(task))
    line = child.receive()
    try:
        figures: dict[str, float] = json.loads(line)
    except ValueError:
        raise child.failure(f"expected figures, got {line[:200]!r}") from None
    return figures
