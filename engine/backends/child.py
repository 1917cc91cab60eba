"""One engine process, seen from the process that started it: its socket, its last words, its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from engine import logs
from engine.config import EngineConfig, child_environment, our_packages
from engine.errors import ConfigError, EngineDeadError, EngineError
from engine.process import (
    LAST_WORDS_MS,
    MALFORMED,
    STALLED_STATUS,
    Failed,
    Failing,
    Ready,
    ToChild,
    ToParent,
    decode_to_parent,
    encode,
    encode_config,
    make_socket,
)
from engine.request import Capabilities

logger = logging.getLogger("seraph.engine")

COMMAND = (sys.executable, "-P", "-m", "engine.process")
"""-P: what lies in the current folder must not be taken for our packages."""

SOCKET_NAME = "engine"

SUN_PATH_MAX = 107
"""Bytes of a Unix socket's path, unix(7), less the final zero."""

NUM_LAST_LINES = 20
"""Lines of the child's standard error kept for the message that reports its death."""

READ_SIZE = 65536


class Child:
    """A running engine process.

    The constructor starts it without an event loop, so that a program can have the child import and map its model
    while it does the same itself; the calling thread must outlive the child (the kernel ends the child with it).
    `connect` then attaches it to the running loop. `end`, or without `connect` `kill`, must follow in any case.

    Raises EngineError where no process can be started, ConfigError where its socket has no place.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] = COMMAND) -> None:
        self._folder = _make_socket_folder()
        self._socket_path = Path(self._folder.name) / SOCKET_NAME
        try:
            # The child sees the end of this pipe when we are gone, however we went. Nothing is ever written to it.
            lifeline, self._lifeline = os.pipe()
            options = {
                "--socket": str(self._socket_path),
                "--log-level": logs.active_level(),
                "--log-format": logs.active_format(),
                "--config": encode_config(config),
            }
            try:
                self._process = subprocess.Popen(
                    [*command, *itertools.chain.from_iterable(options.items())],
                    stdin=lifeline,
                    stderr=subprocess.PIPE,
                    env=child_environment(PYTHONPATH=our_packages()),
                    process_group=0,  # Ctrl-C is for the parent, also while the child still imports
                )
            except BaseException:
                os.close(self._lifeline)
                raise
            finally:
                os.close(lifeline)
        except OSError as error:
            self._folder.cleanup()
            raise EngineError(f"the engine process could not be started: {error}") from error
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._socket_fd = -1
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._partial_line = b""
        self._exited: asyncio.Task[int] | None = None
        self._stderr_ended: asyncio.Event | None = None
        self._first: asyncio.Future[ToParent] | None = None
        self._on_message: Callable[[ToParent], None] | None = None
        self._reason = ""  # of its end, as it says itself
        self._reason_known: asyncio.Event | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def connect(self, on_message: Callable[[ToParent], None], timeout: float) -> Capabilities:
        """Wait until the child is ready; from then on `on_message` is called with each message, in order.

        Raises what the child could not start for (ConfigError, ModelError, ...), and EngineError where it died or
        said nothing for `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        self._first = loop.create_future()
        self._on_message = on_message
        self._stderr_ended = asyncio.Event()
        self._reason_known = asyncio.Event()
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        loop.add_reader(self._process.stderr.fileno(), self._read_stderr)
        self._exited = loop.create_task(self._wait_exit(), name="engine-exit")
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = make_socket(self._context)
        self._socket.connect(f"ipc://{self._socket_path}")
        self._socket_fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._socket_fd, self._read_socket)
        self._read_socket()  # the descriptor reports changes only

        await asyncio.wait((self._first, self._exited), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if self._first.done():
            # Connected, the socket needs its name no longer: so a parent that is killed leaves nothing behind.
            self._folder.cleanup()
            match self._first.result():
                case Ready(capabilities):
                    return capabilities
                case Failed(fault):
                    raise fault.to_error()
                case other:
                    raise EngineError(f"the engine process began with {type(other).__name__}, expected Ready.")
        if self._exited.done():
            raise EngineError(f"the engine process {self.describe_exit()} before it was ready.{self.last_words()}")
        raise EngineError(f"the engine process was not ready after {timeout:g} s.{self.last_words()}")

    def send(self, message: ToChild) -> None:
        """Queue a message. Raises EngineDeadError where the child has left, OverflowError for an int over 64 bits."""
        frame = encode(message)
        if self._socket is None:
            raise EngineDeadError("the engine process has ended.")
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise EngineDeadError("the engine process has left its socket.") from None
        # Sending consumes what makes the descriptor readable: without a look, a message that came meanwhile would lie
        # there until the next one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self._read_socket)

    async def wait(self) -> None:
        """Until the process has ended (after `connect` began)."""
        assert self._exited is not None and self._reason_known is not None
        if await asyncio.shield(self._exited) == STALLED_STATUS:
            with contextlib.suppress(TimeoutError):  # its last message may still be on its way
                await asyncio.wait_for(self._reason_known.wait(), LAST_WORDS_MS / 1000)

    def describe_exit(self) -> str:
        """How the process ended: "was killed by SIGKILL", "exited with status 1", and why, where it said so."""
        status = self._process.returncode
        if status is None:
            return "is running"
        if status >= 0:
            reason = self._reason or ("a thread has stalled" if status == STALLED_STATUS else "")
            return f"exited with status {status}" + (f" ({reason})" if reason else "")
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-status).name}{hint}"

    def last_words(self) -> str:
        """The last lines of its standard error, to be appended to a message; empty where it wrote nothing."""
        return "" if not self._last_lines else " Its last words:\n" + "\n".join(self._last_lines)

    async def end(self, grace: float) -> None:
        """End the process (SIGTERM, after `grace` seconds SIGKILL), reap it and free everything. Idempotent."""
        loop = asyncio.get_running_loop()
        self._on_message = None
        try:
            await asyncio.shield(loop.create_task(self._end_process(grace)))
        finally:
            if self._socket is not None and self._context is not None:
                loop.remove_reader(self._socket_fd)
                self._socket.close(linger=0)
                self._socket = None
                self._context.term()
            self._folder.cleanup()

    def kill(self) -> None:
        """End and reap the process at once, without an event loop: for one that was never connected. Idempotent."""
        assert self._exited is None
        self._process.kill()
        self._process.wait()
        self._close_pipes()
        self._folder.cleanup()

    async def _end_process(self, grace: float) -> None:
        if self._exited is None:
            self.kill()
            return
        if not self._exited.done():
            self._process.terminate()
            await asyncio.wait((self._exited,), timeout=grace)
        if not self._exited.done():
            logger.warning("the engine process ignored SIGTERM for %g s: killing it", grace)
            self._process.kill()
        await self._exited
        self._close_pipes()

    def _close_pipes(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _read_socket(self) -> None:
        """Hand out every message that has arrived."""
        while self._socket is not None:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_to_parent(frame)
            except MALFORMED:
                logger.exception("ignored a malformed message of %d bytes from the engine process", len(frame))
                continue
            if self._first is not None and not self._first.done():
                self._first.set_result(message)
            elif isinstance(message, Failing):
                self._reason = message.fault.message.rstrip(".")
                assert self._reason_known is not None
                self._reason_known.set()
            elif self._on_message is not None:
                self._on_message(message)

    def _read_stderr(self) -> None:
        """Pass on what the child writes, and keep its last lines."""
        assert self._process.stderr is not None and self._stderr_ended is not None
        fd = self._process.stderr.fileno()
        try:
            chunk = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        if not chunk:
            asyncio.get_running_loop().remove_reader(fd)
            self._stderr_ended.set()
        *lines, self._partial_line = (self._partial_line + chunk).split(b"\n")
        if not chunk and self._partial_line:
            lines.append(self._partial_line)
        for line in lines:
            self._pass_on(line)

    def _pass_on(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self._last_lines.append(text)
        if logs.active_format() == "json" and not line.startswith(logs.JSON_START):
            # A library's or the interpreter's own words, a traceback after a crash: no line of ours is without form.
            logger.warning("%s", text)
        else:
            sys.stderr.write(text + "\n")

    async def _wait_exit(self) -> int:
        """The end of its standard error announces the end of the process: nobody else holds that pipe."""
        assert self._stderr_ended is not None
        await self._stderr_ended.wait()
        return await asyncio.to_thread(self._process.wait)


def _make_socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A new folder, mode 0700, with a name short enough for a socket in it; removed at exit at the latest."""
    parents = dict.fromkeys((tempfile.gettempdir(), "/tmp"))
    for parent in parents:
        with contextlib.suppress(OSError):
            folder = tempfile.TemporaryDirectory(prefix="seraph-", dir=parent, ignore_cleanup_errors=True)
            if len(os.fsencode(os.path.join(folder.name, SOCKET_NAME))) <= SUN_PATH_MAX:
                return folder
            folder.cleanup()
    raise ConfigError(
        f"TMPDIR must be writable and at most {SUN_PATH_MAX - len('/seraph-12345678/') - len(SOCKET_NAME)} bytes long, "
        f"for the engine's socket; neither of {', '.join(parents)} is."
    )
