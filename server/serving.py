"""`seraph serve`: from settings to a listening server, and from a signal to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from engine import logs
from engine.cache.sizing import readable
from engine.errors import ConfigError, SeraphError
from engine.request import Capabilities
from server.kinds import Kind
from server.launching import Launched, launch
from server.settings import Settings, is_loopback, unknown_environment, version

logger = logging.getLogger("seraph.server")

BACKLOG = 2048
LINGER = 5
"""Seconds that connections have to close after the last request has ended."""
LAST_WORDS = 0.5
"""Seconds that requests have to end once they are cut off."""
ECHO = 0.3
"""Seconds in which the same signal is the same wish: `timeout` and others send one to a process and to its group."""

TERMINATED = 128 + signal.SIGTERM


def serve(settings: Settings) -> int:
    """Serve until a signal ends it; returns the exit status. Raises SeraphError for what keeps it from serving.

    The order makes the start short: the port is taken before anything slow, the engine processes map their models, side
    by side, while this one imports the web framework and reads the tokenizers.
    """
    signal.signal(signal.SIGTERM, _terminate)  # until the server takes over: as process 1 nothing would end us
    logs.configure(settings.log_level, settings.log_format)
    for name, meant in unknown_environment().items():
        logger.warning("%s is set in the environment and means nothing to Seraph; is it meant to be %s?", name, meant)
    if settings.allow_remote_load and not settings.admin_key:
        logger.warning("--allow-remote-load has no effect without --admin-key: /admin is closed")
    settings.need_one_engine()  # what cannot be is said before anything is done
    settings.engine_configs()
    stated = settings.generation_defaults()
    listener = bind(settings.host, settings.port)
    with listener:
        launched = launch(settings)
        try:
            return _run(settings, launched, stated, listener)
        finally:
            for one in launched:
                one.engine.kill()


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket bound to an address, not yet listening. Raises ConfigError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is no address of this machine: {error}.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unavailable(host, port, error) from None
    return listener


def watch_peers(listener: socket.socket, seconds: float) -> None:
    """Have the kernel end connections whose peer is gone, or takes nothing that is sent, for that long.

    Connections inherit this from the listener. Their end is then a disconnect like any other, which frees what the
    request holds; without it a peer that never reads would keep its place at the gate for ever.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(seconds / 2)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(seconds / 6)))


def _unavailable(host: str, port: int, error: OSError) -> ConfigError:
    match error.errno:
        case errno.EADDRINUSE:
            return ConfigError(f"Port {port} on {host} is in use. Stop what listens there, or choose another --port.")
        case errno.EACCES:
            return ConfigError(f"Port {port} needs more rights than this user has. Choose a --port of 1024 or above.")
        case errno.EADDRNOTAVAIL:
            return ConfigError(f"--host {host} is no address of this machine.")
        case _:
            return ConfigError(f"Cannot listen on {host} port {port}: {error.strerror}.")


def _run(
    settings: Settings,
    launched: Sequence[Launched],
    stated: Mapping[str, float] | None,
    listener: socket.socket,
) -> int:
    """Everything from the engines' launch to their end."""
    # Imported here, while the engine processes are busy with their own start.
    import uvicorn
    import uvloop

    from server.app import create_app
    from server.loading import served
    from server.protocol import BoundedProtocol
    from server.routes.service import Service

    models = [
        served(settings, stated, one.loaded, one.engine, names=one.names, source=one.source, host=one.host)
        for one in launched
    ]
    for one in launched:
        one.loaded.close()  # its weights are the engine process's
    failure: SeraphError | None = None
    status = 0
    first = (signal.SIGTERM, 0.0)
    tasks: list[asyncio.Task[None]] = []

    class Protocol(BoundedProtocol):
        head_timeout = settings.body_timeout

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn's own, but a signal that was obeyed is not raised again: the exit status is ours to choose."""
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.end, number)
            try:
                yield
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

        def end(self, number: signal.Signals) -> None:
            """Drain and exit; asked again, exit at once."""
            nonlocal status, first
            if not self.should_exit:
                first = (number, time.monotonic())
                self.should_exit = service.draining = True
                # What is still running when the time is over fails as by a dead engine: with a proper error.
                tasks.append(asyncio.create_task(service.stop(drain=settings.drain_timeout)))
            elif not self.force_exit and (first[0] != number or time.monotonic() - first[1] > ECHO):
                self.force_exit = True
                status = 128 + number
                num_running = len(self.server_state.tasks)
                logger.warning("%s again: stopping at once, requests cut off: %d", number.name, num_running)
                tasks.append(asyncio.create_task(self.cut_off()))

        async def cut_off(self) -> None:
            """End every request: with a proper error where its caller reads it in time, else with its connection."""
            await service.stop(drain=0.0)
            running = self.server_state.tasks
            if running:
                await asyncio.wait(running, timeout=LAST_WORDS)
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            if running:
                await asyncio.wait(running, timeout=LAST_WORDS)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            if self.force_exit:
                # uvicorn leaves requests and the lifespan as they are, to be cancelled, with tracebacks, by the loop.
                await asyncio.gather(*tasks)
                await self.lifespan.shutdown()

    def on_started(error: SeraphError | None) -> None:
        nonlocal failure
        failure = error
        if error is None:
            gc.freeze()  # what is loaded stays: later collections need not walk it
            tables = [
                Table(
                    one.names,
                    one.capabilities(),
                    one.generation_defaults,
                    one.text.chats,
                    one.kind,
                    one.host,
                    one.text.tool_format.name if one.text.tool_format is not None else "",
                )
                for one in models
            ]
            print(banner(settings, tables, listener.getsockname()[1]), flush=True)
        else:
            web.should_exit = True

    app = create_app(settings, models, on_started=on_started)
    service: Service = app.state.service
    web = Server(
        uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_timeout) + LINGER,
        )
    )

    async def main() -> None:
        try:
            await web.serve(sockets=[listener])
        finally:
            await asyncio.gather(*tasks, service.stop(drain=0.0))

    watch_peers(listener, settings.send_timeout)
    try:
        listener.listen(BACKLOG)  # before the address is printed, so that nobody who reads it is refused
    except OSError as error:
        raise _unavailable(settings.host, settings.port, error) from None
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    if failure is not None:
        raise failure
    return status


@dataclass(frozen=True, slots=True)
class Table:
    """What a start says of one model; `chats`: it has a chat template; `host` is the model whose threads it shares;
    `tools` is how it writes calls of them."""

    names: Sequence[str]
    known: Capabilities
    defaults: Mapping[str, float]
    chats: bool = True
    kind: Kind = Kind.GENERATE
    host: str = ""
    tools: str = ""

    def rows(self) -> dict[str, str]:
        known = self.known
        own = f"{known.isa}, {_threads(known)}" if known.isa else known.version
        same = {
            "model": ", ".join(self.names),
            "weights": _weights(known),
            "kernels": f"in the gaps of {self.host}" if self.host else own,
            "context": _context(known),
        }
        if self.kind is Kind.GENERATE:
            sampling = ", ".join(f"{name} {value:g}" for name, value in self.defaults.items())
            return {**same, "KV cache": _kv_cache(known), "sampling": sampling, "tools": self.tools}
        assert known.encoder is not None
        if self.kind is Kind.SCORE:
            return {**same, "scores": f"{known.encoder.num_labels} label{'s' if known.encoder.num_labels != 1 else ''}"}
        return {**same, "embeds": f"{known.encoder.output_size} dimensions"}

    def example(self) -> tuple[str, dict[str, object]]:
        """A route of this model, and what to ask it."""
        if self.kind is Kind.SCORE:
            return "rerank", {
                "query": "capital of France",
                "documents": ["Paris is a city.", "Cheese is made of milk."],
            }
        if self.kind is Kind.EMBED:
            return "embeddings", {"input": "The capital of France is Paris."}
        if self.chats:
            return "chat/completions", {"messages": [{"role": "user", "content": "Tell me the capital of France."}]}
        return "completions", {"prompt": "The capital of France is"}


def banner(settings: Settings, tables: Sequence[Table], port: int) -> str:
    """What a start says: each model, what it runs on, what fits; who may come in, where it listens, how to try it."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    reachable = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else host
    door = {
        "door": "key" if settings.api_key else "loopback only" if is_loopback(settings.host) else "open to everyone",
        "admin": "/admin/models, by its key" if settings.admin_key else "",
        "listening": f"http://{host}:{port}",
    }
    path, asked = tables[0].example()
    body = json.dumps({"model": tables[0].names[0], **asked})
    key = ' -H "authorization: Bearer $SERAPH_API_KEY"' if settings.api_key else ""
    *others, last = [table.rows() for table in tables]
    blocks = [*others, last | door]
    table = "\n\n".join("\n".join(f"  {name:<10} {value}" for name, value in rows.items() if value) for rows in blocks)
    curl = f"curl http://{reachable}:{port}/v1/{path} -H 'content-type: application/json'{key} -d '{body}'"
    return f"Seraph {version()}\n\n{table}\n\nTry it:\n\n  {curl}\n"


def _weights(known: Capabilities) -> str:
    """Q4_1 GGUF, packed 4-bit: 135 million parameters in 97 MB"""
    bits = known.weights.bits
    packed = "bfloat16" if bits == 16 else f"packed {bits}-bit" if bits else ""
    form = ", ".join(filter(None, (known.checkpoint_format, packed)))
    if not known.num_parameters:
        return form
    millions = known.num_parameters / 1e6
    count = f"{millions:,.0f} million" if millions < 1000 else f"{millions / 1000:,.1f} billion"
    return f"{form or 'unknown'}: {count} parameters in {readable(known.weights.nbytes)}"


def _threads(known: Capabilities) -> str:
    """2 threads; 2 ranks of 1 thread; 3 threads in 2 ranks"""
    ranks, each = known.num_ranks, known.threads // max(known.num_ranks, 1)
    if ranks <= 1:
        return _counted(known.threads, "thread")
    if ranks * each == known.threads:
        return f"{ranks} ranks of {_counted(each, 'thread')}"
    return f"{known.threads} threads in {ranks} ranks"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _context(known: Capabilities) -> str:
    """8192 tokens, and why not as many as the model was made for"""
    reduced = f" (of the model's {known.max_position})" if known.max_position > known.max_model_len else ""
    return f"{known.max_model_len} tokens{reduced}"


def _kv_cache(known: Capabilities) -> str:
    """16384 tokens of bf16 in 512 blocks, 377 MB: 2 requests of full length"""
    full = known.kv_cache_tokens / known.max_model_len
    fit = f"{full:.1f}".removesuffix(".0")
    nbytes = f", {readable(known.kv_cache_bytes)}" if known.kv_cache_bytes else ""
    size = f" in {known.num_kv_blocks} blocks{nbytes}" if known.num_kv_blocks else ""
    dtype = f" of {known.kv_cache_dtype}" if known.kv_cache_dtype else ""
    return f"{known.kv_cache_tokens} tokens{dtype}{size}: {fit} request{'s' if fit != '1' else ''} of full length"


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(TERMINATED)
