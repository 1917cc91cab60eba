"""The engine's loop in a process of its own: `python -m engine.process --socket PATH --config JSON`.

The child binds one ZeroMQ PAIR socket in a folder that only its user can enter, the parent connects
(`engine/backends/child.py`), and msgpack frames of the tagged structs below go both ways.
A crash in a kernel or an out-of-memory kill takes this process and not the server, which starts another one
(`engine/backends/native.py`).

This module is what the child runs, and it must start fast: nothing is imported that the loop does not need.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import zmq

from engine import logs
from engine.config import EngineConfig
from engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    FormatError,
    ModelError,
    RequestError,
    SeraphError,
    SourceError,
    StalledRankError,
    UnsupportedModelError,
)
from engine.request import Capabilities, Embedded, EmbedRequest, EngineStats, Request, TokenDelta

logger = logging.getLogger("seraph.engine")

IDLE_CHECK_MS = 1000
"""How long the loop must have been idle before it checks the core's bookkeeping, so that no request waits for that."""

FAILED_LINGER_MS = 5000
"""How long a child that failed to start stays for its parent to read why."""

STALLED_STATUS = 70
"""Exit status of a child of which a thread has stalled: EX_SOFTWARE of sysexits.h."""

LAST_WORDS_MS = 1000
"""How long such a child tries to tell its parent."""

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # linux/prctl.h


class Core(Protocol):
    """What the loop drives: `engine.core.EngineCore`, or a scripted one in tests."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def embed(self, request: EmbedRequest) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[TokenDelta]: ...
    def take_embedded(self) -> list[Embedded]: ...
    def stats(self) -> EngineStats: ...
    def capabilities(self) -> Capabilities: ...
    def check_integrity(self) -> None: ...


class _Closable(Protocol):
    def close(self) -> None: ...


Closes = TypeVar("Closes", bound=_Closable)
Asked = TypeVar("Asked", Request, EmbedRequest)

BuildCore = Callable[[EngineConfig], AbstractContextManager[Core]]


# --- What is said. Parent to child: Add, Embed, Abort, StatsRequest. Child to parent: the others. ---


class Add(msgspec.Struct, frozen=True, tag=True):
    """Take this request. Answered by Deltas, or by one Refused."""

    request: Request


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Make vectors of these texts. Answered by one Vectors, or by one Refused."""

    request: EmbedRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget this request. Answered by Aborted, after which no delta of it follows."""

    request_id: str


class StatsRequest(msgspec.Struct, frozen=True, tag=True):
    """Answered by Stats, between two steps."""


class Fault(msgspec.Struct, frozen=True):
    """An exception of `engine.errors` on its way to another process. `kind` is the name of its class."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float = 1.0

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """Keeps the nearest class that crosses; anything foreign becomes an EngineError that names it."""
        for kind in type(error).__mro__:
            if kind in _FAULT_KINDS.values():
                return cls(
                    kind=kind.__name__,
                    message=str(error),
                    param=getattr(error, "param", None),
                    code=getattr(error, "code", None),
                    retry_after=getattr(error, "retry_after", 1.0),
                )
        return cls(kind="EngineError", message=f"{type(error).__name__}: {error}")

    def to_error(self) -> SeraphError:
        if self.kind == "RequestError":
            return RequestError(self.message, param=self.param, code=self.code)
        if self.kind == "EngineOverloadedError":
            return EngineOverloadedError(self.message, retry_after=self.retry_after)
        return _FAULT_KINDS.get(self.kind, EngineError)(self.message)


# RequestError's subclasses cross as RequestError: param and code say all that the API shows of them.
_FAULT_KINDS: dict[str, type[SeraphError]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        ModelError,
        SourceError,
        FormatError,
        UnsupportedModelError,
        RequestError,
        EngineError,
        EngineDeadError,
        StalledRankError,
        EngineOverloadedError,
    )
}


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message of a child that started."""

    capabilities: Capabilities


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The first and only message of a child that could not start."""

    fault: Fault


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """All deltas of one step."""

    deltas: list[TokenDelta]


class Vectors(msgspec.Struct, frozen=True, tag=True):
    """What became of the texts of one request."""

    embedded: Embedded


class Refused(msgspec.Struct, frozen=True, tag=True):
    """This request was not taken."""

    request_id: str
    fault: Fault


class Aborted(msgspec.Struct, frozen=True, tag=True):
    """This request is gone: no delta of it follows, and its id may be used again."""

    request_id: str


class Stats(msgspec.Struct, frozen=True, tag=True):
    """Answers one StatsRequest."""

    stats: EngineStats


class Failing(msgspec.Struct, frozen=True, tag=True):
    """The last message of a child that cannot go on and ends."""

    fault: Fault


ToChild = Add | Embed | Abort | StatsRequest
ToParent = Ready | Failed | Deltas | Vectors | Refused | Aborted | Stats | Failing

encode = msgspec.msgpack.Encoder().encode
decode_to_child = msgspec.msgpack.Decoder(ToChild).decode
decode_to_parent = msgspec.msgpack.Decoder(ToParent).decode

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding may raise."""


def encode_config(config: EngineConfig) -> str:
    """The configuration as JSON, for the child's command line."""
    return msgspec.json.encode(config, enc_hook=str).decode()


def decode_config(text: str) -> EngineConfig:
    """The inverse of encode_config. Raises ConfigError for a value that cannot work."""
    try:
        return msgspec.json.decode(text, type=EngineConfig, dec_hook=lambda kind, value: kind(value))
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the engine process was given a malformed configuration: {error}") from error


def make_socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A PAIR socket for either end, not yet bound or connected."""
    socket = context.socket(zmq.PAIR)
    # No limit in number: what is queued is bounded by the requests admitted and the tokens they may produce, and a
    # child that waited for its parent to read could not be told to abort.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 10)  # ms; the parent connects before the child has bound
    return socket


# --- The loop ---


def run(core: Core, socket: zmq.Socket[bytes], stop_fds: Sequence[int]) -> None:
    """Serve until one of `stop_fds` is readable or at its end.

    Idle, it sleeps in poll; busy, it only looks for messages between two steps. An exception out of `core.step` is
    our bug and leaves the core in an unknown state: it is not caught, the process ends and the parent starts anew. So
    it does at a StalledRankError, which is told to the parent first.
    """
    try:
        _loop(core, socket, stop_fds)
    except zmq.Again:
        logger.warning("the parent has left the socket")  # only then can a send find no room
    except StalledRankError as error:
        with contextlib.suppress(zmq.Again):
            socket.send(encode(Failing(Fault.of(error))), zmq.NOBLOCK)
        raise


def _loop(core: Core, socket: zmq.Socket[bytes], stop_fds: Sequence[int]) -> None:
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    for fd in stop_fds:
        poller.register(fd, zmq.POLLIN)
    checked = True
    while True:
        busy = core.has_work
        checked = checked and not busy
        events = dict(poller.poll(0 if busy else None if checked else IDLE_CHECK_MS))
        if any(fd in events for fd in stop_fds):
            return
        if socket in events:
            _receive(core, socket)
        elif not busy and not checked:
            core.check_integrity()
            checked = True
        if core.has_work:
            deltas = core.step()
            if deltas:
                socket.send(encode(Deltas(deltas)), zmq.NOBLOCK)
            for embedded in core.take_embedded():
                socket.send(encode(Vectors(embedded)), zmq.NOBLOCK)


def _receive(core: Core, socket: zmq.Socket[bytes]) -> None:
    """Handle every message that has arrived."""
    while True:
        try:
            frame = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return
        try:
            message = decode_to_child(frame)
        except MALFORMED as error:
            _refuse_malformed(frame, error, socket)
            continue
        match message:
            case Add(request):
                with logs.request(request.trace):
                    _take(core.add, request, socket)
            case Embed(texts):
                with logs.request(texts.trace):
                    _take(core.embed, texts, socket)
            case Abort(request_id):
                core.abort(request_id)
                socket.send(encode(Aborted(request_id)), zmq.NOBLOCK)
            case StatsRequest():
                socket.send(encode(Stats(core.stats())), zmq.NOBLOCK)


def _take(take: Callable[[Asked], None], request: Asked, socket: zmq.Socket[bytes]) -> None:
    try:
        take(request)
    except Exception as error:
        if not isinstance(error, SeraphError):
            logger.exception("request %s could not be taken", request.request_id)
        socket.send(encode(Refused(request.request_id, Fault.of(error))), zmq.NOBLOCK)


def _refuse_malformed(frame: bytes, error: Exception, socket: zmq.Socket[bytes]) -> None:
    """Log a frame that is no message, and where it names a request, refuse that: somebody waits for it."""
    logger.warning("ignored a malformed message of %d bytes: %s", len(frame), error)
    try:
        request_id = _decode_named(frame).request.request_id
    except MALFORMED:
        return
    fault = Fault.of(RequestError(f"The request is malformed: {error}."))
    socket.send(encode(Refused(request_id, fault)), zmq.NOBLOCK)


class _Named(msgspec.Struct):
    request_id: str


class _NamedAdd(msgspec.Struct):
    request: _Named


_decode_named = msgspec.msgpack.Decoder(_NamedAdd).decode


# --- The process ---


@contextlib.contextmanager
def load_core(config: EngineConfig) -> Iterator[Core]:
    """The core over its mapped models; all are closed at the end."""
    # Imported here, because the parent imports this module for its messages and needs neither kernels nor scheduler.
    from engine.encoder_core import build_core
    from engine.weights import load_encoder, load_packed

    with contextlib.ExitStack() as open_things:

        def closing(thing: Closes) -> Closes:
            open_things.callback(thing.close)
            return thing

        model = closing(load_packed(config.model, home=config.home, **config.load_options()))
        encoder = None
        if config.embedding_model is not None:
            encoder = closing(load_encoder(config.embedding_model, home=config.home, **config.load_options()))
        yield closing(build_core(config, model, encoder, exit_status=STALLED_STATUS))


def main(argv: Sequence[str] | None = None, build: BuildCore = load_core) -> int:
    """The child's whole life; returns its exit status. `build` is the seam for a core of another kind.

    It ends at SIGTERM, and when standard input, whose other end the parent holds, reaches its end: a parent that is
    gone, however it went, leaves no orphan.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    die_with_parent()
    faulthandler.enable()
    parser = argparse.ArgumentParser(prog="engine.process", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", required=True, type=Path, help="where to bind")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--log-level", default="info", choices=logs.LEVELS, help="least severe messages to log")
    parser.add_argument("--log-format", default="text", choices=logs.FORMATS, help="how lines look")
    options = parser.parse_args(argv)
    logs.configure(options.log_level, options.log_format)

    lifeline = sys.stdin.fileno()
    context = zmq.Context[zmq.Socket[bytes]]()
    socket = make_socket(context)
    socket.bind(f"ipc://{options.socket}")
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        try:
            core = stack.enter_context(build(decode_config(options.config)))
            ready = Ready(core.capabilities())
        except Exception as error:
            if not isinstance(error, SeraphError):
                logger.exception("the engine could not be built")
            socket.send(encode(Failed(Fault.of(error))))
            _wait(lifeline, FAILED_LINGER_MS)
            return 1
        socket.send(encode(ready))
        gc.freeze()  # what is loaded stays: later collections need not walk it
        try:
            run(core, socket, (lifeline, _terminate_fd()))
        except StalledRankError as error:
            logger.critical("%s The process ends.", error)
            context.destroy(linger=LAST_WORDS_MS)
            # At once: nothing may be freed, and nobody joined, beneath a thread that may go on at any time.
            os._exit(STALLED_STATUS)
    return 0


def die_with_parent(name: bytes = b"seraph-engine") -> None:
    """Have the kernel end this process with its parent, even in the middle of a step; and give it a name in `ps`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        logger.warning("prctl(PR_SET_PDEATHSIG) failed: %s", os.strerror(ctypes.get_errno()))
    libc.prctl(PR_SET_NAME, name, 0, 0, 0)


def _terminate_fd() -> int:
    """From here on SIGTERM makes this descriptor readable, and so ends the loop between two steps."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return readable


def _wait(fd: int, timeout_ms: int) -> None:
    """Until `fd` is readable or at its end, or the time is over."""
    poller = zmq.Poller()
    poller.register(fd, zmq.POLLIN)
    poller.poll(timeout_ms)


if __name__ == "__main__":
    sys.exit(main())
