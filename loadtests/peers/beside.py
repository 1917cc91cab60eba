"""Our server over vLLM beside vLLM's own: one vLLM, the same options, both alive, asked in turn.

What differs is what stands between a client and vLLM's engine. In each round both are started anew, so that rounds are
independent of one another, what memory a process happened to get included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from loadtests.peers import records, serving
from loadtests.peers.plan import OURS, Task
from loadtests.peers.processes import output_of
from loadtests.peers.seraph import ROOT
from loadtests.peers.serving import Server
from loadtests.peers.systems import Place

THEIRS = "vllm"
CONCURRENCY = (32, 128)
TASK = Task(name="serve", kind="serve", family="serve", concurrency=CONCURRENCY, waves=3, spread=0.5, seconds=1800.0)
SETTING = "bf16, eager"

MAX_LEN, MAX_SEQS, MAX_BATCHED, KV_BYTES = 8192, 256, 2048, 2 << 30

ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
"""What ours sets for itself, for both."""


def ours(place: Place, folder: Path) -> Server:
    """`seraph serve --engine vllm` with the model in `folder`."""
    command = [
        *(place.python, "-m", "server.cli", "serve", folder, "--engine", "vllm", "--served-model-name", serving.MODEL),
        *("--port", "{port}", "--log-level", "warning"),
        *("--max-model-len", MAX_LEN, "--max-num-seqs", MAX_SEQS, "--max-num-batched-tokens", MAX_BATCHED),
        *("--kv-cache-memory", KV_BYTES, "--vllm-arg", "enforce-eager=true"),
    ]
    return Server(command, ENVIRONMENT, place.logs / "beside-seraph.log", folder=ROOT)


def theirs(place: Place, folder: Path) -> Server:
    """vLLM's own server, told all that ours tells its vLLM: a test holds the two commands against each other."""
    command = [
        *(place.python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", "{port}"),
        *("--uvicorn-log-level", "warning", f"--model={folder}", f"--served-model-name={serving.MODEL}"),
        *("--runner=generate", f"--max-model-len={MAX_LEN}", f"--max-num-seqs={MAX_SEQS}"),
        *(f"--max-num-batched-tokens={MAX_BATCHED}", "--tensor-parallel-size=1", "--pipeline-parallel-size=1"),
        *(f"--kv-cache-memory-bytes={KV_BYTES}", "--enable-prefix-caching", "--scheduling-policy=priority"),
        *("--structured-outputs-config.backend=guidance", "--enforce-eager"),
    ]
    return Server(command, ENVIRONMENT, place.logs / "beside-vllm.log")


def vllm_version(place: Place) -> str:
    """Of the vLLM in an environment. Raises SystemFailure where it lacks vLLM, or holds another checkout of ours."""
    asked = (
        "import pathlib, server.cli, vllm.version; where = pathlib.Path(server.cli.__file__).resolve().parents[1]; "
        f"assert where == pathlib.Path({str(ROOT)!r}), f'{{where}} is imported instead of this checkout'; "
        "print(vllm.version.__version__)"
    )
    log = place.logs / "beside-version.log"
    return output_of([place.python, "-c", asked], log=log, seconds=120, folder=ROOT).split()[-1]


def run(
    servers: Mapping[str, Server],
    path: Path,
    results: records.Results,
    *,
    rounds: int,
    seconds: float,
    measure: Callable[[Mapping[str, Server], Task], Mapping[str, Mapping[str, float]]] = serving.measure_in_turn,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Measure the rounds that are not measured yet, each written down when both have been. Whether all of them are.

    No round begins after `seconds`. Raises SystemFailure.
    """
    deadline = clock() + seconds
    for number in range(rounds):
        if all(results.has(number, THEIRS, system, TASK.name) for system in servers):
            continue
        if clock() > deadline:
            say(f"stopped after {seconds / 60:.0f} minutes; the same command goes on")
            return False
        order = (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS)
        say(f"[{number + 1}/{rounds}] {order[0]} first")
        begin = clock()
        measured = measure({name: servers[name] for name in order}, TASK)
        for system, figures in measured.items():
            record = records.Measurement(
                round=number, pair=THEIRS, system=system, task=TASK.name, setting=SETTING, figures=figures
            )
            records.write(path, record)
            results.add(record)
        for streams in TASK.concurrency:
            rates = (f"{system} {measured[system][f'tokens_per_second@{streams}']:.1f}" for system in (OURS, THEIRS))
            say(f"    {streams} streams: {', '.join(rates)} tokens/s")
        say(f"    {clock() - begin:.0f} s")
    return True
