"""`python -m loadtests.peers`: Seraph beside vLLM, OpenVINO GenAI and llama.cpp, on this machine, in turn.

run: install what is missing, measure what is not measured yet, write the page. beside-vllm: measure our server over
vLLM beside vLLM's own, write that part of the page. report: write the page from results.

Exit status: 0 where all was measured, 1 where something failed or is left, 2 for wrong arguments, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from loadtests.peers import beside, beside_report, environments, machine, plan, records, report, runner
from loadtests.peers.llamacpp import LlamaCpp
from loadtests.peers.openvino import OpenVino
from loadtests.peers.processes import SystemFailure, output_of
from loadtests.peers.seraph import ROOT, Seraph
from loadtests.peers.serving import MODEL
from loadtests.peers.systems import Place, System
from loadtests.peers.vllm import Vllm, make_folder

PEERS: Mapping[str, System] = {system.name: system for system in (LlamaCpp(), OpenVino(), Vllm())}
CACHE = Path.home() / ".cache" / "seraph-peers"
RESULTS = ROOT / "benchmarks" / "results" / "peers.jsonl"
BESIDE = "beside-vllm.jsonl"
"""Beside the other results: a comparison that is measured at other times."""
PAGE = ROOT / "docs" / "performance.md"
CONCURRENCY, QUICK_CONCURRENCY = (1, 4, 16, 32, 64), (1, 32)
CONTEXTS, QUICK_CONTEXTS = (128, 1024, 4096, 8064), (128, 4096)
"""The longest leaves the 8k context of the model room for what is decoded."""
ROUNDS, WHOLE_ROUNDS, QUICK_ROUNDS, BESIDE_ROUNDS = 7, 3, 2, 10
VLLM_ENVIRONMENT = ROOT / ".venv-vllm"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        return {"run": _run, "beside-vllm": _beside, "report": _report}[options.command](options)
    except (records.RecordsError, SystemFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, SystemFailure) and error.log:
            print(error.log, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtests.peers", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="install, measure, write the page")
    run.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS), help="default: all")
    run.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="only these, such as serve or decode-1")
    run.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, fewer sizes, one trial")
    run.add_argument("--rounds", type=_positive, help=f"pairs of what the bars compare (default {ROUNDS})")
    run.add_argument("--whole", type=_positive, help=f"pairs of everything else (default {WHOLE_ROUNDS})")
    run.add_argument("--envs", type=Path, default=CACHE / "envs", help="folder of the peers' environments")
    run.add_argument("--env", action="append", default=[], type=_named, metavar="NAME=DIR", help="an existing one")
    over = commands.add_parser("beside-vllm", help="measure Seraph over vLLM beside vLLM's own server")
    over.add_argument("--rounds", type=_positive, default=BESIDE_ROUNDS, help="pairs (default %(default)s)")
    over.add_argument(
        "--env",
        type=_environment,
        default=VLLM_ENVIRONMENT,
        metavar="DIR",
        help="an environment with vLLM and this checkout (default: %(default)s, which `make bench-vllm` installs)",
    )
    for command in (run, over):
        command.add_argument("--minutes", type=_positive, default=240, help="start no turn after so long (default 240)")
        command.add_argument(
            "--models", type=Path, default=CACHE / "models", help="folder of what is made of the model"
        )
        command.add_argument(
            "--gguf", type=Path, help="the default model's file (default: the one that Seraph fetched)"
        )
        command.add_argument("--fresh", action="store_true", help="put results that are there aside and start anew")
    write = commands.add_parser("report", help="write the page from results")
    for command in (run, over, write):
        results = RESULTS.with_name(BESIDE) if command is over else RESULTS
        command.add_argument("--results", type=Path, default=results, help="JSON lines (default: %(default)s)")
        command.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _named(text: str) -> tuple[str, Path]:
    known = {name for system in PEERS.values() for name in system.environments}
    name, _, folder = text.partition("=")
    if name not in known:
        raise argparse.ArgumentTypeError(f"NAME must be one of {', '.join(sorted(known))}, got {name!r}")
    return name, _environment(folder)


def _environment(folder: str) -> Path:
    if not (Path(folder) / "bin" / "python").exists():
        raise argparse.ArgumentTypeError(f"{folder!r} is no virtual environment")
    return Path(folder).absolute()


def _report(options: argparse.Namespace) -> int:
    results, page, over = options.results, options.page, options.results.with_name(BESIDE)
    part = beside_report.section_of(page.read_text()) if page.exists() else ""
    if over.exists():
        part = beside_report.section(records.read(over))
    if results.exists() or not part:
        from loadtests.peers import plots  # matplotlib is for the page alone

        report.write(records.read(results), page, page.with_suffix(""), plots.draw)
    if part:
        _put(part, page)
    print(f"wrote {page}")
    return 0


def _put(part: str, page: Path) -> None:
    page.write_text(beside_report.put(page.read_text() if page.exists() else "", part))


def _beside(options: argparse.Namespace) -> int:
    logs = options.results.parent.absolute() / "peers-logs"
    place = _place(options, options.env / "bin" / "python", _default_model(options, logs), logs)
    version = f"vLLM {beside.vllm_version(place)}"
    header = records.Header(
        machine=machine.describe(),
        plan={
            "peers": [beside.THEIRS],
            "rounds": options.rounds,
            "concurrency": beside.CONCURRENCY,
            "model": MODEL,
        },
        versions={plan.OURS: f"{_title(Seraph())} over {version}", beside.THEIRS: f"{version}'s own server"},
    )
    results = _resume(options, header)
    folder = make_folder(place)
    servers = {plan.OURS: beside.ours(place, folder), beside.THEIRS: beside.theirs(place, folder)}
    complete = beside.run(
        servers, options.results, results, rounds=options.rounds, seconds=60.0 * options.minutes, say=_say
    )
    _put(beside_report.section(results), options.page)
    print(f"wrote {options.page}")
    return 0 if complete else 1


def _say(line: str) -> None:
    print(line, flush=True)


def _resume(options: argparse.Namespace, header: records.Header) -> records.Results:
    if options.fresh and options.results.exists():
        options.results.rename(options.results.with_suffix(".old.jsonl"))
    return records.resume(options.results, header)


def _run(options: argparse.Namespace) -> int:
    logs = options.results.parent.absolute() / "peers-logs"
    tasks = plan.tasks(
        QUICK_CONCURRENCY if options.quick else CONCURRENCY, QUICK_CONTEXTS if options.quick else CONTEXTS
    )
    chosen = tuple(task for task in tasks if not options.tasks or task.name in options.tasks)
    if unknown := set(options.tasks) - {task.name for task in tasks}:
        raise records.RecordsError(f"--tasks must be of {', '.join(t.name for t in tasks)}, got {', '.join(unknown)}")
    peers: list[System] = [PEERS[name] for name in PEERS if name in options.peers]
    systems: dict[str, System] = {plan.OURS: Seraph(), **{peer.name: peer for peer in peers}}
    header = records.Header(
        machine=machine.describe(),
        plan={
            "peers": [peer.name for peer in peers],
            "rounds": options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            "whole": options.whole or WHOLE_ROUNDS,
            "concurrency": QUICK_CONCURRENCY if options.quick else CONCURRENCY,
            "contexts": QUICK_CONTEXTS if options.quick else CONTEXTS,
            "tasks": [task.name for task in chosen],
            "model": MODEL,
        },
        versions={name: _title(system) for name, system in systems.items()},
    )
    results = _resume(options, header)
    places, failed = _places(options, systems, logs)
    made = runner.Runner(
        systems,
        places,
        options.results,
        results,
        seconds=60.0 * options.minutes,
        trials=1 if options.quick else runner.TRIALS,
        say=_say,
    )
    for name, failure in failed.items():
        made.fail(name, failure, "installing it and making its model")
    ready = [system for system in peers if system.name not in failed]
    complete = made.run(plan.turns(runner.groups(ready, chosen), header.plan["rounds"], header.plan["whole"]))
    _report(options)
    return 0 if complete else 1


def _title(system: System) -> str:
    """With the commit, for ours: a run does not go on with other code."""
    if system.name != plan.OURS:
        return system.title
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return f"{system.title} {asked.stdout.strip()}".strip()


def _places(
    options: argparse.Namespace, systems: Mapping[str, System], logs: Path
) -> tuple[dict[str, Place], dict[str, SystemFailure]]:
    """Where each system finds what it needs, installed and made; and those for which that failed.

    Raises SystemFailure where ours does not work: there is nothing to compare then.
    """
    gguf = _default_model(options, logs)
    places = {plan.OURS: _place(options, Path(sys.executable), gguf, logs)}
    failed: dict[str, SystemFailure] = {}
    given = dict(options.env)
    for name, system in systems.items():
        if name == plan.OURS:
            continue
        print(f"preparing {system.title}", flush=True)
        try:
            pythons = {
                key: environments.python_of(key, environment, given=given, folder=options.envs.absolute(), logs=logs)
                for key, environment in system.environments.items()
            }
            places[name] = _place(options, next(iter(pythons.values())), gguf, logs)
            system.prepare(places[name], pythons)
        except SystemFailure as failure:
            failed[name] = failure
    return places, failed


def _place(options: argparse.Namespace, python: Path, gguf: Path, logs: Path) -> Place:
    return Place(python=python, gguf=gguf, models=options.models.absolute(), logs=logs, threads=machine.num_cpus())


def _default_model(options: argparse.Namespace, logs: Path) -> Path:
    """The default model's GGUF file, which Seraph fetches. Raises SystemFailure where it does not work."""
    python = Path(sys.executable)
    Seraph().prepare(_place(options, python, Path(), logs), {})
    return Path(options.gguf or _fetched(python, logs)).absolute()


def _fetched(python: Path, logs: Path) -> Path:
    """The default model's GGUF file as `seraph pull` left it."""
    listed = output_of(
        [python, "-m", "server.cli", "models", "--json"], log=logs / "seraph-models.log", seconds=60, folder=ROOT
    )
    for model in json.loads(listed):
        source = re.fullmatch(r"pypi:([^=]+)==([^/]+)/(.+)", model["source"])
        if model["name"] == MODEL and source:
            home = Path(model["path"]).parents[1]
            return home / "models" / f"{source[1]}-{source[2]}" / source[3]
    raise SystemFailure(f"{MODEL} is not among the models of `seraph models`", listed)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # unwinds, so that what was started is stopped


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
