from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

import engine.backends.child
import engine.backends.native
import engine.process
from engine.config import EngineConfig
from engine.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    FormatError,
    RequestError,
    SeraphError,
    SourceError,
    UnsupportedModelError,
)
from engine.process import (
    Abort,
    Aborted,
    Add,
    Deltas,
    Failed,
    Fault,
    Ready,
    Refused,
    Stats,
    StatsRequest,
    ToParent,
    decode_config,
    decode_to_child,
    decode_to_parent,
    encode,
    encode_config,
    make_socket,
    run,
)
from engine.request import FinishReason, Request, SamplingParams, TokenDelta
from tests.engine import scripted_core
from tests.engine.scripted_core import ScriptedCore, expected_tokens

LIMIT_MS = 20_000  # only reached by a failing test

Socket = zmq.Socket[bytes]


def request(request_id: str, prompt: list[int], max_tokens: int | None = 4) -> Request:
    return Request(
        request_id=request_id,
        model="scripted",
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens),
        seed=2**64 - 1,
    )


def receive(socket: Socket) -> ToParent:
    assert socket.poll(LIMIT_MS), "no message"
    message: ToParent = decode_to_parent(socket.recv())
    return message


def receive_tokens(socket: Socket, request_id: str) -> list[int]:
    tokens: list[int] = []
    while True:
        message = receive(socket)
        assert isinstance(message, Deltas)
        for delta in message.deltas:
            if delta.request_id == request_id:
                tokens += delta.token_ids
                if delta.finish_reason is not None:
                    return tokens


class Loop:
    """`run` over a scripted core, in a thread of its own."""

    def __init__(self, core: ScriptedCore) -> None:
        self.core = core
        self._context = zmq.Context[Socket]()
        self._child, self.parent = make_socket(self._context), make_socket(self._context)
        self._child.bind("inproc://loop")
        self.parent.connect("inproc://loop")
        self._stop, self._stopper = os.pipe()
        self.thread = threading.Thread(target=run, args=(core, self._child, (self._stop,)))
        self.thread.start()

    def say(self, message: object) -> None:
        self.parent.send(encode(message))

    def close(self) -> None:
        os.close(self._stopper)
        self.thread.join(LIMIT_MS / 1000)
        os.close(self._stop)
        self._context.destroy(linger=0)
        assert not self.thread.is_alive()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop(ScriptedCore(EngineConfig(model="scripted")))
    yield loop
    loop.close()


# --- The loop ---


def test_a_request_runs_to_its_end(loop: Loop) -> None:
    loop.say(Add(request("a", [7])))
    assert receive_tokens(loop.parent, "a") == expected_tokens([7], 4)


def test_all_deltas_of_a_step_are_one_message() -> None:
    core = ScriptedCore(EngineConfig(model="scripted"))
    for name in "abc":
        core.add(request(name, [ord(name)]))
    loop = Loop(core)
    for _ in range(4):
        message = receive(loop.parent)
        assert isinstance(message, Deltas)
        assert [delta.request_id for delta in message.deltas] == ["a", "b", "c"]
    loop.close()
    assert core.num_steps == 4


def test_no_delta_follows_aborted(loop: Loop) -> None:
    loop.say(Add(request("a", [7], max_tokens=None)))
    assert isinstance(receive(loop.parent), Deltas)
    loop.say(Abort("a"))
    while isinstance(message := receive(loop.parent), Deltas):
        pass
    assert message == Aborted("a")
    loop.say(StatsRequest())
    answer = receive(loop.parent)
    assert isinstance(answer, Stats) and answer.stats.num_running == 0


def test_aborting_what_is_not_there_is_answered_too(loop: Loop) -> None:
    loop.say(Abort("nobody"))
    assert receive(loop.parent) == Aborted("nobody")


def test_a_refused_request_keeps_param_and_code(loop: Loop) -> None:
    loop.say(Add(request("a", [])))
    refused = receive(loop.parent)
    assert isinstance(refused, Refused) and refused.request_id == "a"
    error = refused.fault.to_error()
    assert isinstance(error, RequestError) and (error.param, error.code) == ("prompt", "empty_prompt")


MALFORMED = [
    b"",
    b"\xc1",
    b"\x00",
    b"\xff" * 100,
    msgspec.msgpack.encode([1, 2, 3]),
    msgspec.msgpack.encode({"type": "Nonsense"}),
    msgspec.msgpack.encode({"type": "Add"}),
    msgspec.msgpack.encode({"type": "Add", "request": {"request_id": 5}}),
    msgspec.msgpack.encode({"type": "Abort", "request_id": ["a"]}),
    encode(Add(request("a", [1])))[:-3],
    encode(Ready(ScriptedCore(EngineConfig()).capabilities())),
    b"\xa4\xff\xff\xff\xff",  # a string that is not UTF-8
    b"\x91" * 5000,  # nested deeper than any message, at the top and in a field that nobody knows
    b"\x82\xa4type\xa5Abort\xa1x" + b"\x91" * 5000,
]


@pytest.mark.parametrize("frame", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_frame_is_ignored(loop: Loop, frame: bytes) -> None:
    loop.parent.send(frame)
    loop.say(Add(request("a", [7])))
    assert receive_tokens(loop.parent, "a") == expected_tokens([7], 4)


def test_a_malformed_request_that_has_an_id_is_refused(loop: Loop) -> None:
    loop.say({"type": "Add", "request": {"request_id": "a", "prompt_token_ids": ["x"]}})
    refused = receive(loop.parent)
    assert isinstance(refused, Refused) and refused.request_id == "a"
    error = refused.fault.to_error()
    assert isinstance(error, RequestError) and "malformed" in str(error)


def test_a_bug_in_add_refuses_that_request_only(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    def add(request: Request) -> None:
        raise ZeroDivisionError("a bug")

    good = loop.core.add
    loop.core.add = add  # type: ignore[method-assign]
    loop.say(Add(request("a", [7])))
    refused = receive(loop.parent)
    assert isinstance(refused, Refused)
    error = refused.fault.to_error()
    assert type(error) is EngineError and "ZeroDivisionError: a bug" in str(error)
    loop.core.add = good  # type: ignore[method-assign]
    loop.say(Add(request("b", [7])))
    assert receive_tokens(loop.parent, "b") == expected_tokens([7], 4)
    assert "ZeroDivisionError" in caplog.text


def test_the_books_are_checked_once_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.process, "IDLE_CHECK_MS", 1)
    checked, checks = threading.Event(), []

    class Core(ScriptedCore):
        def check_integrity(self) -> None:
            checks.append(self.has_work)
            checked.set()

    loop = Loop(Core(EngineConfig(model="scripted")))
    for name in ("a", "b"):
        loop.say(Add(request(name, [7])))
        receive_tokens(loop.parent, name)
        assert checked.wait(LIMIT_MS / 1000)
        checked.clear()
    loop.close()
    assert checks == [False, False]


def test_it_ends_when_nobody_reads() -> None:
    """A send that finds no peer ends the loop instead of waiting for ever."""
    core = ScriptedCore(EngineConfig(model="scripted"))
    core.add(request("a", [7], max_tokens=None))
    context = zmq.Context[Socket]()
    socket = make_socket(context)
    socket.bind("inproc://nobody")
    run(core, socket, ())
    context.destroy(linger=0)
    assert core.num_steps == 1


# --- What crosses ---


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("c"),
        SourceError("s"),
        FormatError("f", path="model.gguf", offset=7),
        UnsupportedModelError("u"),
        EngineError("e"),
        EngineDeadError("d"),
        RequestError("r", param="p", code="c"),
        EngineOverloadedError("o", retry_after=3.5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_crosses_as_itself(error: SeraphError) -> None:
    frame = encode(Failed(Fault.of(error)))
    message = decode_to_parent(frame)
    assert isinstance(message, Failed)
    crossed = message.fault.to_error()
    assert type(crossed) is type(error) and str(crossed) == str(error)
    for name in ("param", "code", "retry_after"):
        assert getattr(crossed, name, None) == getattr(error, name, None)


def test_a_subclass_crosses_as_the_nearest_known_class() -> None:
    crossed = Fault.of(ContextLengthError(max_model_len=10, num_tokens=12)).to_error()
    assert type(crossed) is RequestError
    assert (crossed.param, crossed.code) == ("messages", "context_length_exceeded")
    assert str(crossed).startswith("This model's maximum context length is 10 tokens")


def test_a_foreign_error_crosses_with_its_name() -> None:
    crossed = Fault.of(OSError(28, "No space left on device")).to_error()
    assert type(crossed) is EngineError and "OSError" in str(crossed) and "No space left" in str(crossed)


def test_messages_survive_the_wire() -> None:
    message = Add(request("a", [1, 2]))
    assert decode_to_child(encode(message)) == message
    deltas = Deltas([TokenDelta(request_id="a", position=3, token_ids=[4], finish_reason=FinishReason.STOP)])
    assert decode_to_parent(encode(deltas)) == deltas


def test_the_configuration_survives_the_command_line() -> None:
    config = EngineConfig(model="m", home=Path("/home/of models"), threads=3, enable_prefix_caching=False)
    assert decode_config(encode_config(config)) == config
    assert decode_config(encode_config(EngineConfig())) == EngineConfig()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"threads": "many"}', '{"threads": -1}'])
def test_a_malformed_configuration_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError):
        decode_config(text)


def test_nothing_is_pickled() -> None:
    for module in (engine.process, engine.backends.child, engine.backends.native):
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        nodes = list(ast.walk(ast.parse(source)))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "multiprocessing"}
        assert "_pyobj" not in source  # ZeroMQ's own way to pickle


def test_the_child_imports_little() -> None:
    """Each of these costs a tenth of a second or more before the first token."""
    script = "import sys, engine.process; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    modules = subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True).stdout
    assert "engine.process" in modules.split()
    assert not set(modules.split()) & {"numpy", "asyncio", "tokenizers", "jinja2", "fastapi", "httpx", "gguf"}


# --- The process ---


class Process:
    """A scripted engine process, and the parent's end of its socket."""

    def __init__(self, folder: Path) -> None:
        self._context = zmq.Context[Socket]()
        self.socket = make_socket(self._context)
        self.socket.connect(f"ipc://{folder}/s")
        self.popen = subprocess.Popen(
            [sys.executable, scripted_core.__file__, "--socket", f"{folder}/s", "--config", "{}"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert isinstance(receive(self.socket), Ready)

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdin is not None and self.popen.stderr is not None
        self.popen.stdin.close()
        self.popen.stderr.close()
        self._context.destroy(linger=0)


@pytest.fixture
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("p"))
    yield process
    process.close()


def answers(process: Process) -> bool:
    process.socket.send(encode(StatsRequest()))
    while isinstance(message := receive(process.socket), Deltas):
        pass
    return isinstance(message, Stats)


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_it_cleanly(process: Process, busy: bool) -> None:
    if busy:
        process.socket.send(encode(Add(request("a", [1], max_tokens=None))))
        receive(process.socket)
    assert answers(process)  # it is in its loop, where the signal is handled
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(LIMIT_MS / 1000) == 0
    assert process.popen.stderr is not None
    assert scripted_core.CLOSED in process.popen.stderr.read().decode()


def test_sigint_is_the_parents_business(process: Process) -> None:
    process.popen.send_signal(signal.SIGINT)
    assert answers(process)


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_when_its_lifeline_does(process: Process, busy: bool) -> None:
    if busy:
        process.socket.send(encode(Add(request("a", [1], max_tokens=None))))
        receive(process.socket)
    assert process.popen.stdin is not None
    process.popen.stdin.close()
    assert process.popen.wait(LIMIT_MS / 1000) == 0
    assert process.popen.stderr is not None
    assert scripted_core.CLOSED in process.popen.stderr.read().decode()


def test_idle_it_sleeps(process: Process) -> None:
    """Over one idle second, the check of the books included, it uses under 1 % of a CPU."""
    process.socket.send(encode(Add(request("a", [1]))))
    receive_tokens(process.socket, "a")
    pid = process.popen.pid
    wait_until(lambda: sleeps(pid))
    before, start = cpu_seconds(pid), time.monotonic()
    wait_until(lambda: time.monotonic() - start > 1.5)
    # The clock counts ticks of 10 ms: allow one that was nearly over.
    assert cpu_seconds(pid) - before <= 0.01 * (time.monotonic() - start) + 0.01


@pytest.mark.parametrize("prompt", [[1], [scripted_core.HANG]], ids=["in its loop", "in a step that hangs"])
def test_a_killed_parent_leaves_no_orphan(tmp_path: Path, prompt: list[int]) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, scripted_core.__file__, str(prompt[0])],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    assert not gone(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(pid))
    assert not list(tmp_path.iterdir())


PARENT = """
import asyncio, functools, sys, threading
from engine.backends.child import Child
from engine.backends.native import NativeEngine
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from tests.engine.scripted_core import AT_POSITION

async def main():
    command = (sys.executable, "-P", sys.argv[1])
    engine = NativeEngine(EngineConfig(), spawn=functools.partial(Child, command=command))
    await engine.start()
    request = Request(request_id="a", model="m", prompt_token_ids=[int(sys.argv[2])], sampling=SamplingParams(), seed=0)
    async for delta in engine.generate(request):
        if delta.position + len(delta.token_ids) == AT_POSITION:
            print(engine.pid, flush=True)

asyncio.run(main())
"""


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT_MS / 1000
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def process_state(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, from the state on; proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def sleeps(pid: int) -> bool:
    return process_state(pid)[0] == "S"


def gone(pid: int) -> bool:
    """Ended; a process that nobody reaps counts as ended too."""
    try:
        return process_state(pid)[0] in "ZX"
    except FileNotFoundError:
        return True


def cpu_seconds(pid: int) -> float:
    user, system = process_state(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
