"""A real server for tests: `seraph serve` in a process of its own, on a free loopback port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def live_server(model: str | Path, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yields the address of a ready server, http://127.0.0.1:port, and ends it by SIGTERM.

    Its log goes to the test's stderr. AssertionError where it does not get ready or does not end well.
    """
    command = [sys.executable, "-m", "server.cli", "serve", str(model), "--port", "0", "--drain-timeout", "2", *flags]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SERAPH_")}
    kept = {"SERAPH_HOME": os.environ["SERAPH_HOME"]} if "SERAPH_HOME" in os.environ else {}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=inherited | kept | dict(environment or {})
    )
    try:
        assert process.stdout is not None
        banner = []
        for line in process.stdout:  # ends when the server does
            banner.append(line)
            if found := re.search(r"listening +(http://\S+)", line):
                yield found[1]
                break
        else:
            raise AssertionError(f"the server ended with status {process.wait()}: {''.join(banner)}")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
