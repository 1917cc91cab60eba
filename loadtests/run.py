"""`python -m loadtests.run`: load on a server of its own, or on one that runs, for a bounded time; then a report.

Exit status: 0 for a run without failures, 1 for failures or no answer at all, 2 for wrong arguments, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from loadtests import report, scenario
from loadtests.target import MAX_SECONDS, MAX_USERS, TargetError, check_target

ROOT = Path(__file__).parents[1]
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
READY_SECONDS = 120.0  # a first start fetches and packs the model
STOP_SECONDS = 30.0
GRACE_SECONDS = 30.0  # what Locust may take beyond the run itself
POLL_SECONDS = 0.1


class RunError(Exception):
    """The run could not be made; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        chosen = scenario.load(options.scenario)
        if options.url:
            check_target(options.url, allow_remote=options.allow_remote)
        with contextlib.ExitStack() as stack:
            url = options.url or stack.enter_context(own_server(options.server_flags, options.api_key))
            wait_until_ready(url)
            print(f"{chosen.name}: {chosen.description}\n{options.users} users, {options.seconds} s, {url}", flush=True)
            measured = run_locust(url, options)
    except (RunError, TargetError, scenario.ScenarioError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    made = report.summarize(measured)
    print(f"\n{report.as_table(made)}")
    if options.json:
        options.json.write_text(report.as_json(made))
    if options.markdown:
        options.markdown.write_text(report.as_markdown(made))
    return 0 if made.succeeded() else 1


def _parser() -> argparse.ArgumentParser:
    def count(limit: int) -> type[int]:
        def parse(text: str) -> int:
            value = int(text)
            if not 1 <= value <= limit:
                raise argparse.ArgumentTypeError(f"must be between 1 and {limit}, got {text}")
            return value

        return parse  # type: ignore[return-value]

    parser = argparse.ArgumentParser(prog="loadtests.run", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="", help="a running server; by default one is started and stopped again")
    parser.add_argument("--users", type=count(MAX_USERS), default=8, metavar="N", help="users at once (8)")
    parser.add_argument("--seconds", type=count(MAX_SECONDS), default=30, metavar="N", help="how long (30)")
    parser.add_argument("--scenario", default="chat", help=f"a file, or one of {', '.join(scenario.names())} (chat)")
    parser.add_argument("--model", default="", help="model to ask for; by default the server's first")
    parser.add_argument("--api-key", default="", help="key of the server")
    parser.add_argument("--allow-remote", action="store_true", help="permit a --url beyond this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report here as Markdown")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="after --: flags of the server to start")
    return parser


@contextlib.contextmanager
def own_server(flags: Sequence[str], api_key: str) -> Iterator[str]:
    """`seraph serve` on a free loopback port; yields its address and ends it with the block. Raises RunError."""
    key = ["--api-key", api_key] if api_key else []
    quiet = ["--log-level", "warning"]  # a line per request is part of no load test
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", *quiet, *key, *flags]
    with _child(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"listening +(https?://\S+)", line):
                yield found[1]  # the rest of the pipe stays unread: the server logs to stderr
                return
        raise RunError(f"the server did not start:\n{''.join(said)}".rstrip())


def wait_until_ready(url: str, seconds: float = READY_SECONDS) -> None:
    """Return once /health/ready answers 200. Raises RunError after `seconds`."""
    deadline = time.monotonic() + seconds
    said = "nothing"
    with httpx.Client(base_url=url, timeout=5.0) as client:
        while time.monotonic() < deadline:
            try:
                response = client.get("/health/ready")
            except httpx.HTTPError as error:
                said = f"{type(error).__name__}: {error}"
            else:
                if response.is_success:
                    return
                said = f"status {response.status_code}"
            time.sleep(POLL_SECONDS)
    raise RunError(f"{url} was not ready within {seconds:g} s; last it said {said}")


def run_locust(url: str, options: argparse.Namespace) -> report.Measurements:
    """Let Locust's users at a server; what they measured. Raises RunError where Locust fails."""
    with tempfile.TemporaryDirectory(prefix="seraph-load-") as folder:
        path = Path(folder) / "measurements.json"
        command = [
            *(sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--headless", "--only-summary"),
            *("--skip-log", "--loglevel", "WARNING", "--exit-code-on-error", "0", "--host", url),
            *("--users", str(options.users), "--spawn-rate", str(options.users), "--run-time", f"{options.seconds}s"),
            *("--scenario", options.scenario, "--model", options.model, "--api-key", options.api_key),
            *("--measurements", str(path), *(["--allow-remote"] if options.allow_remote else [])),
        ]
        with _child(command) as process:
            try:
                status = process.wait(options.seconds + GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                raise RunError(f"Locust did not end within {GRACE_SECONDS:g} s after its time") from None
        if status != 0 or not path.exists():
            raise RunError(f"Locust ended with status {status}")
        return report.Measurements.from_json(path.read_text())


@contextlib.contextmanager
def _child(command: Sequence[str], stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block: asked to end first, then killed.

    It has a process group of its own, so that Ctrl-C reaches it through us and in order.
    """
    process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, text=True, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # unwinds, so that what was started is stopped


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
