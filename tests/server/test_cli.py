"""The command line: help, errors and exit statuses, ports; the chat in a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError, EngineError
from engine.request import SamplingParams
from engine.weights.catalog import catalog
from server.cli import app
from server.parameters import (
    INTERRUPTED,
    WRONG_CONFIG,
    SettingsCommand,
    completing,
    repeat_greedy,
    takes_settings,
    told,
)
from server.serving import bind
from server.settings import Settings, options
from server.terminal import Conversation, LocalPartner, Messages, RemotePartner
from tests.server.fakes import FakeEngine, FakeText, say
from tests.server.support import listening
from tests.tiny_families import tiny_folder
from tests.tiny_gguf import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
ALIASES = [entry.name for entry in catalog()]

cli = CliRunner()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "-h"], ["chat", "--help"], ["pull", "-h"], ["convert", "-h"], ["models", "-h"]]
)
def test_help(arguments: list[str]) -> None:
    result = cli.invoke(app, arguments)
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_the_help_of_serve_names_every_setting() -> None:
    text = " ".join(cli.invoke(app, ["serve", "--help"], terminal_width=200).output.split())
    for declared in options():
        assert declared.flag in text
        assert declared.environment_name in text.replace(" ", "")


def test_version() -> None:
    result = cli.invoke(app, ["--version"])
    assert (result.exit_code, result.output.split()[0]) == (0, "seraph")


def seraph(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: `serve` sets up logging and signals for the whole process."""
    command = [sys.executable, "-m", "server.cli", *arguments]
    environment = os.environ | ({} if home is None else {"SERAPH_HOME": str(home)})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "many"], "error: --port must be a whole number between 0 and 65535, got 'many'"),
        (["--host", "0.0.0.0"], "pass --insecure"),
        (["--host", "no such host", "--insecure"], "is no address of this machine"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "8"], "max_num_batched_tokens"),
        (["--host", "192.0.2.1", "--insecure", "--port", "0"], "is no address of this machine"),
        (["x/m.gguf", "y/m.gguf"], "Two models would be called 'm': give each a name of its own"),
        (["--api-key", "same", "--admin-key", "same"], "--admin-key and --api-key must differ"),
    ],
)
def test_wrong_settings_exit_with_two(arguments: list[str], said: str) -> None:
    done = seraph("serve", *arguments)
    assert done.returncode == WRONG_CONFIG
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_noticed_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = seraph("serve", "no-such-model", "--port", str(port))
    assert done.returncode == WRONG_CONFIG
    assert f"Port {port} on 127.0.0.1 is in use" in done.stderr


@pytest.mark.parametrize("arguments", [["serve", "--port", "0"], ["pull"], ["chat"]])
def test_an_unknown_model(arguments: list[str]) -> None:
    done = seraph(arguments[0], "no-such-model", *arguments[1:])
    assert done.returncode == 1
    assert "no-such-model" in done.stderr
    assert "Traceback" not in done.stderr


def unusable(folder: Path) -> dict[str, str]:
    """Folders that no start can use, and what is said of them."""
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96}
    foreign, partial, cut = (tiny_folder(name, **sizes) for name in ("qwen3", "qwen3", "phi3"))
    foreign.config["model_type"] = "mamba"
    del partial.tensors["model.layers.1.self_attn.k_norm.weight"]
    fused = "model.layers.0.self_attn.qkv_proj.weight"
    cut.tensors[fused] = cut.tensors[fused][:-16]
    return {
        str(foreign.write(folder / "foreign")): "model_type must be one of bert, ",
        str(partial.write(folder / "partial")): "tensor model.layers.1.self_attn.k_norm.weight [16] is missing",
        str(cut.write(folder / "cut")): f"tensor {fused}: expected shape [128, 64], found [112, 64]",
    }


def test_a_model_that_cannot_be_used(tmp_path: Path) -> None:
    for source, said in unusable(tmp_path).items():
        done = seraph("serve", source, "--port", "0")
        assert done.returncode == WRONG_CONFIG
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_more_ranks_than_the_model_has_query_heads(tmp_path: Path) -> None:
    source = str(tiny_folder("qwen3").write(tmp_path / "model"))
    done = seraph("serve", source, "--port", "0", "--tensor-parallel-size", "9")
    assert done.returncode == WRONG_CONFIG
    assert "tensor_parallel_size must be at most 4, the query heads of the model, got 9." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    folder = tiny_folder("qwen3").write(tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    done = seraph("chat", str(folder))
    assert done.returncode == WRONG_CONFIG
    assert "a chat needs a chat template, and bare has none: give one with --chat-template" in done.stderr


def test_a_chat_is_with_one_model() -> None:
    done = seraph("chat", "a.gguf", "b.gguf")
    assert (done.returncode, done.stderr) == (WRONG_CONFIG, "error: A chat is with one model, got a.gguf, b.gguf.\n")


def test_models_that_do_not_start_are_named(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "long.gguf", context=4096)
    write_tiny_llama(tmp_path / "short.gguf", context=512)
    models = [str(tmp_path / name) for name in ("long.gguf", "short.gguf")]
    done = seraph("serve", *models, "--port", "0", "--max-model-len", "1024", home=tmp_path / "home")
    assert done.returncode == WRONG_CONFIG
    assert "short was not started: max_model_len must be at most 512" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: max_model_len must be at most 512, the model's context, got 1024."


def test_models_lists_the_catalogue(tmp_path: Path) -> None:
    result = cli.invoke(app, ["models"], env={"SERAPH_HOME": str(tmp_path)})
    assert result.exit_code == 0
    assert "smollm2-135m-instruct" in result.output
    assert "can be pulled" in result.output


def test_ctrl_c_has_its_own_status() -> None:
    with pytest.raises(typer.Exit) as caught, told():
        raise KeyboardInterrupt
    assert caught.value.exit_code == INTERRUPTED


def test_bind_takes_a_free_port() -> None:
    with bind("127.0.0.1", 0) as listener, bind("localhost", 0):
        assert listener.getsockname()[1] > 0
        listener.listen()
        with pytest.raises(ConfigError, match="is in use"):
            bind("127.0.0.1", listener.getsockname()[1])


def test_starting_imports_nothing_heavy() -> None:
    """`seraph --help` and the first part of `serve` must not wait for the web framework."""
    heavy = ("fastapi", "uvicorn", "rich.progress", "tokenizers", "httpx")
    code = f"import sys, server.cli, server.serving; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The chat


@dataclass
class Script:
    """A terminal with prepared lines."""

    lines: list[str]
    written: list[str] = field(default_factory=list)

    def read(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    @property
    def text(self) -> str:
        return "".join(self.written)


@dataclass
class Parrot:
    """Answers with what it was told; fails, or is interrupted, when asked to."""

    heard: list[Messages] = field(default_factory=list)

    async def answer(self, messages: Messages) -> AsyncGenerator[str, None]:
        self.heard.append(messages)
        said = messages[-1]["content"]
        if said == "fail":
            raise EngineError("it failed")
        yield "you said "
        if said == "interrupt":
            raise KeyboardInterrupt
        yield said


def converse(partner: Parrot, *lines: str, system: str = "") -> Script:
    script = Script(list(lines))
    with asyncio.Runner() as runner:
        conversation = Conversation(partner, system, read=script.read, write=script.written.append)
        conversation.run(runner)
    return script


def test_a_conversation_keeps_its_history() -> None:
    parrot = Parrot()
    script = converse(parrot, "one", "", "two", "/exit", "never", system="S")
    assert "you said one" in script.text and "you said two" in script.text
    assert script.lines == ["never"]
    assert [message["content"] for message in parrot.heard[1]] == ["S", "one", "you said one", "two"]


def test_clear_begins_anew() -> None:
    parrot = Parrot()
    converse(parrot, "one", "/clear", "two", system="S")
    assert [message["content"] for message in parrot.heard[1]] == ["S", "two"]


def test_a_failed_turn_leaves_no_trace() -> None:
    parrot = Parrot()
    script = converse(parrot, "fail", "two")
    assert "error: it failed" in script.text
    assert [message["content"] for message in parrot.heard[1]] == ["two"]


def test_an_interrupted_answer_stays_as_far_as_it_came() -> None:
    parrot = Parrot()
    script = converse(parrot, "interrupt", "two")
    assert "[interrupted]" in script.text
    assert [message["content"] for message in parrot.heard[1]] == ["interrupt", "you said ", "two"]


HI = [{"role": "user", "content": "Hi"}]


async def test_a_local_partner() -> None:
    engine = FakeEngine(lambda request: say(request, "Hello"))
    await engine.start()
    partner = LocalPartner(engine, FakeText(), SamplingParams(temperature=0.0))
    assert "".join([piece async for piece in partner.answer(HI)]) == "Hello"
    assert engine.requests[0].sampling.temperature == 0.0


async def test_a_remote_partner() -> None:
    engine = FakeEngine(lambda request: say(request, "Hello"))
    async with listening(engine) as url, httpx.AsyncClient(base_url=url) as client:
        partner = RemotePartner(client, "", {"max_tokens": 4})
        assert "".join([piece async for piece in partner.answer(HI)]) == "Hell"
        with pytest.raises(Exception, match="does not exist here"):
            _ = [piece async for piece in RemotePartner(client, "other", {}).answer(HI)]


async def test_a_remote_partner_that_is_not_there() -> None:
    with bind("127.0.0.1", 0) as unheard:
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url) as client:
            with pytest.raises(EngineError, match="does not answer"):
                _ = [piece async for piece in RemotePartner(client, "m", {}).answer(HI)]


# Settings as flags


@pytest.mark.parametrize(
    ("arguments", "repeated"),
    [
        ("--name a b --port 1", "--name a --name b --port 1"),
        ("model --port 1 --name a b c", "model --port 1 --name a --name b --name c"),
        ("--name a b --other x model", "--name a --name b --other x model"),
        ("--name a --name b c", "--name a --name b --name c"),
        ("--name a -- b", "--name a -- b"),
        ("--name=a b", "--name=a b"),
        ("a b", "a b"),
        ("", ""),
    ],
)
def test_a_greedy_flag_takes_what_follows_it(arguments: str, repeated: str) -> None:
    assert repeat_greedy(arguments.split(), ["--name"]) == repeated.split()


@pytest.mark.parametrize(
    ("arguments", "model", "names", "port"),
    [
        ("--served-model-name A B", DEFAULT_MODEL, ("A", "B"), 8000),
        ("m.gguf --served-model-name A B --port 1", "m.gguf", ("A", "B"), 1),
        ("--port 1 m.gguf --served-model-name A B", "m.gguf", ("A", "B"), 1),
        ("--served-model-name A B --port 1 m.gguf", "m.gguf", ("A", "B"), 1),
        ("--served-model-name A --served-model-name B C", DEFAULT_MODEL, ("A", "B", "C"), 8000),
    ],
)
def test_several_names_after_one_flag(arguments: str, model: str, names: tuple[str, ...], port: int) -> None:
    seen: list[Settings] = []
    one = typer.Typer()
    one.command(cls=SettingsCommand)(takes_settings()(lambda settings: seen.append(settings)))
    assert cli.invoke(one, arguments.split(), env={"SERAPH_MODEL": ""}).exit_code == 0
    assert (seen[0].model, seen[0].model_names, seen[0].port) == ((model,), [names], port)


def test_a_flag_without_its_value_is_refused() -> None:
    for rest in (["--port", "1"], [], ["--", "m"]):
        result = cli.invoke(app, ["serve", "--served-model-name", *rest])
        assert result.exit_code == 2 and "--served-model-name: it needs at least one value." in result.output


def test_help_comes_in_the_groups_of_the_settings() -> None:
    text = cli.invoke(app, ["serve", "--help"]).output
    headings = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [*dict.fromkeys(declared.group for declared in options()), "Options"]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("seraph ser", {"serve"}),
        ("seraph serve --max-num-s", {"--max-num-seqs"}),
        ("seraph serve --isa avx", {"avx512", "avx2"}),
        ("seraph serve --log-format ", {"text", "json"}),
        ("seraph serve smol", {"smollm2-135m-instruct"}),
        ("seraph serve smollm2-135m-instruct gem", {"gemma3-270m"}),
        ("seraph serve --embedding-model gem", {"gemma3-270m"}),
        ("seraph chat --quantization int", {"int8", "int4"}),
        ("seraph convert x.gguf y --dtype ", {"bfloat16", "float16", "float32"}),
    ],
)
def test_the_shell_completes(line: str, offered: set[str]) -> None:
    assert set(completed(line).split()) == offered


def completed(line: str, shell: str = "bash", home: str = "") -> str:
    """What `shell` is answered where the cursor stands at the end of `line`."""
    place = len(line.split()) - 1 + line.endswith(" ")
    asked = {"_SERAPH_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(place)}
    asked |= {"_TYPER_COMPLETE_ARGS": line, "SERAPH_HOME": home} if home else {"_TYPER_COMPLETE_ARGS": line}
    result = cli.invoke(app, [], env=asked, prog_name="seraph")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.output.strip()


@pytest.mark.parametrize("command", ["serve", "chat", "pull", "convert", "doctor"])
def test_the_shell_completes_models_on_this_machine(command: str, tmp_path: Path) -> None:
    file = tmp_path / "models/x-y-1.0/z/z.Q8_0.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    folder = file.with_name("folder")
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / ".fetched.json").write_text('{"files": {"config.json": 2}}')
    fetched = ["pypi:x-y==1.0/z/folder", "pypi:x-y==1.0/z/z.Q8_0.gguf"]
    assert completed(f"seraph {command} ", home=str(tmp_path)).split() == [*ALIASES, *fetched]
    assert completed(f"seraph {command} py", home=str(tmp_path)).split() == fetched


@pytest.mark.parametrize("word", ["./", ".", "/tm", "~/mod", "folder/m"])
def test_the_shell_completes_paths_itself(word: str) -> None:
    assert completed(f"seraph serve {word}") == ""
    assert completed(f"seraph serve {word}", "zsh") == "_files"
    script = cli.invoke(app, [], env={"_SERAPH_COMPLETE": "source_bash"}, prog_name="seraph").output
    assert "complete -o default -F" in script  # files, where the function offers nothing


def test_completion_is_quiet_and_light(tmp_path: Path) -> None:
    """Where the cache cannot be read there is nothing to offer; what takes long to import is not needed."""
    record = tmp_path / "hub/org--name/records/0.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    assert completed("seraph serve ", home=str(tmp_path)).split() == ALIASES

    def broken() -> list[str]:
        raise RuntimeError("broken")

    assert completing(broken)("") == []
    script = (
        "import sys\nfrom server.cli import app\ntry: app(prog_name='seraph')\n"
        "finally: print({'numpy', 'tokenizers', 'rich', 'fastapi', 'uvicorn', 'httpx'} & set(sys.modules))"
    )
    asked = {"_SERAPH_COMPLETE": "complete_bash", "COMP_WORDS": "seraph serve ", "COMP_CWORD": "2"}
    environment = {**os.environ, **asked, "SERAPH_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.split("\n"), done.stderr) == ([*ALIASES, "set()", ""], "")


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in cli.invoke(app, ["--help"]).output


def test_a_configuration_file_is_read_before_anything_else(tmp_path: Path) -> None:
    file = tmp_path / "seraph.toml"
    file.write_text("port = 1\nprot = 2\n")
    done = seraph("serve", "no-such-model", "--config", str(file))
    assert done.returncode == WRONG_CONFIG
    assert done.stderr == f"error: {file}:2: prot is not a setting; the nearest one is port.\n"


def test_a_misspelled_environment_name_is_told(tmp_path: Path) -> None:
    environment = {**os.environ, "SERAPH_LOG_LEVEL": "debug", "SERAPH_LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "server.cli", "serve", "no-such-model", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    line = json.loads(done.stderr.splitlines()[0])
    assert line["level"] == "warning" and "SERAPH_LOG_LEVEL" in line["message"] and "SERAPH_LOG?" in line["message"]
