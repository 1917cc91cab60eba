"""Fetching and packing a model in a process of its own: `python -m engine.backends.packing --config JSON --parent PID`.

Beside running engines this work must not hold up the event loop that their streams wait for, and it must be possible to
give it up at any moment. A process of low priority can be killed where a thread cannot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from engine import logs
from engine.config import EngineConfig, child_environment, our_packages
from engine.errors import EngineError, SeraphError
from engine.process import Fault, decode_config, die_with_parent, encode_config
from engine.weights import load_packed, sweep

logger = logging.getLogger("seraph.engine")

COMMAND = (sys.executable, "-P", "-m", "engine.backends.packing")
NICENESS = 10
REPORT_SECONDS = 0.1
MAX_LINE = 1 << 20


class Work(msgspec.Struct, frozen=True, tag=True):
    """One piece of the work and how far it is. `total_bytes` None: nobody knows how much it is."""

    label: str
    done_bytes: int = 0
    total_bytes: int | None = None

    @property
    def packing(self) -> bool:
        """It is the last piece; what comes before it fetches what it packs."""
        return self.label.startswith("Packing ")


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The last word: the model is ready to be mapped, or why it is not."""

    fault: Fault | None = None


_decode = msgspec.json.Decoder(Work | Ended).decode
_encode = msgspec.json.Encoder().encode


async def pack_apart(config: EngineConfig, report: Callable[[Work], None], *, command: Sequence[str] = COMMAND) -> None:
    """Fetch and pack `config.model` where that has not happened yet; `report` hears how far it is.

    Raises what `load_packed` raises, and EngineError where the process died. Cancelled, it ends the process. Whatever
    ends it early, nothing half made stays but what a fetch from a hub will go on with.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--config", encode_config(config), "--parent", str(os.getpid())),
        *("--log-level", logs.active_level(), "--log-format", logs.active_format()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=child_environment(PYTHONPATH=our_packages()),
        start_new_session=True,  # Ctrl-C is for the parent
        limit=MAX_LINE,
    )
    ended: Ended | None = None
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            message = _decode(line)
            if isinstance(message, Ended):
                ended = message
            else:
                report(message)
        status = await process.wait()
        if ended is None:
            raise EngineError(f"fetching and packing {config.model} ended with status {status} and no word why.")
        if ended.fault is not None:
            raise ended.fault.to_error()
    except BaseException:
        await asyncio.shield(asyncio.ensure_future(_clear(process, config)))
        raise


async def _clear(process: asyncio.subprocess.Process, config: EngineConfig) -> None:
    """End the process, and remove what it was writing."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    await asyncio.to_thread(sweep, config.home)


# --- The process ---


class Lines:
    """A `Progress` that writes lines, not more often than somebody could want to read them."""

    def __init__(self, write: Callable[[msgspec.Struct], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._work = Work("")
        self._written_at = 0.0

    def start(self, label: str, total_bytes: int | None) -> None:
        self._work = Work(label, 0, total_bytes)
        self._tell()

    def advance(self, num_bytes: int) -> None:
        self._work = msgspec.structs.replace(self._work, done_bytes=self._work.done_bytes + num_bytes)
        if self._clock() - self._written_at >= REPORT_SECONDS:
            self._tell()

    def done(self) -> None:
        self._tell()

    def _tell(self) -> None:
        self._written_at = self._clock()
        self._write(self._work)


def main(argv: Sequence[str] | None = None) -> int:
    """The process's whole life; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent(b"seraph-packing")
    parser = argparse.ArgumentParser(prog="engine.backends.packing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--parent", required=True, type=int, help="the process to end with")
    parser.add_argument("--log-level", default="info", choices=logs.LEVELS, help="least severe messages to log")
    parser.add_argument("--log-format", default="text", choices=logs.FORMATS, help="how lines look")
    options = parser.parse_args(argv)
    if os.getppid() != options.parent:  # it went before we asked to go with it
        return 1
    logs.configure(options.log_level, options.log_format)
    os.nice(NICENESS)
    lines = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no line of ours

    def write(message: msgspec.Struct) -> None:
        os.write(lines, _encode(message) + b"\n")

    ended = Ended()
    try:
        config = decode_config(options.config)
        load_packed(config.model, home=config.home, progress=Lines(write), **config.load_options()).close()
    except Exception as error:
        if not isinstance(error, SeraphError):
            logger.exception("%s could not be made ready", options.config)
        ended = Ended(Fault.of(error))
    write(ended)
    return 0 if ended.fault is None else 1


if __name__ == "__main__":
    sys.exit(main())
