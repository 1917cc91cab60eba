"""Settings: what beats what, and errors that name key, value and what is allowed."""

from __future__ import annotations

import ast
import dataclasses
import datetime
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine.backends.vllm_options import VllmOptions
from engine.config import DEFAULT_MODEL, EngineConfig
from engine.errors import ConfigError
from server.cli import app
from server.options import Option
from server.settings import Settings, options, resolve, unknown_environment

SERVER = Path(__file__).resolve().parents[2] / "server"


def test_flags_beat_the_environment_which_beats_defaults() -> None:
    environment = {"SERAPH_PORT": "9000", "SERAPH_HOST": "localhost", "SERAPH_THREADS": ""}
    resolved = resolve({"port": "9001", "host": None, "api_key": ()}, environment)
    assert (resolved.port, resolved.host, resolved.threads) == (9001, "localhost", 0)
    assert resolve({}, {}) == Settings()


def test_repeatable_settings() -> None:
    assert resolve({"api_key": ["a", "b"]}, {"SERAPH_API_KEY": "c"}).api_key == ("a", "b")
    assert resolve({}, {"SERAPH_API_KEY": "c, d,"}).api_key == ("c", "d")


@pytest.mark.parametrize(("text", "value"), [("1", True), ("True", True), ("no", False), ("OFF", False)])
def test_switches(text: str, value: bool) -> None:
    assert resolve({}, {"SERAPH_INSECURE": text}).insecure is value
    assert resolve({"insecure": not value}, {"SERAPH_INSECURE": text}).insecure is not value


VALUES: dict[str, tuple[str, str]] = {
    "model": ("x.gguf", " "),
    "embedding_model": ("c.gguf", " "),
    "engine": ("native", "tpu"),
    "vllm_arg": ("enforce-eager=true", " "),
    "quantization": ("int8", "int2"),
    "served_model_name": ("a", " "),
    "chat_template": (__file__, "/no/such/file"),
    "tool_format": ("mistral", "xml"),
    "generation_config": ('{"temperature": 0.5}', "/no/such/file"),
    "default_max_tokens": ("7", "0"),
    "host": ("localhost", " "),
    "port": ("9000", "70000"),
    "api_key": ("a", " "),
    "admin_key": ("b", " "),
    "allow_remote_load": ("on", "maybe"),
    "insecure": ("true", "maybe"),
    "allowed_host": ("a", " "),
    "cors_origin": ("*", " "),
    "max_model_len": ("100", "1"),
    "kv_cache_memory": ("1.5GiB", "lots"),
    "kv_cache_tokens": ("4096", "63"),
    "kv_cache_dtype": ("int8", "fp8"),
    "prefix_caching": ("false", "2"),
    "speculation": ("off", "eagle"),
    "max_num_seqs": ("3", "1.5"),
    "max_num_batched_tokens": ("9", "0"),
    "max_waiting": ("0", "-1"),
    "huge_pages": ("off", "maybe"),
    "threads": ("2", "many"),
    "tensor_parallel_size": ("2", "0"),
    "pipeline_parallel_size": ("2", "0"),
    "stall_timeout": ("2.5", "0"),
    "isa": ("avx2", "sse"),
    "max_body_bytes": ("4096", "1"),
    "strict_fields": ("on", "perhaps"),
    "body_timeout": ("0.5", "nan"),
    "send_timeout": ("3", "0.5"),
    "keep_alive_interval": ("1e1", "inf"),
    "drain_timeout": ("0", "-1"),
    "config": ("", "/no/such/file"),
    "log_level": ("debug", "trace"),
    "log_format": ("json", "xml"),
}
"""Of every setting a value that is right (and not the default) and one that is wrong, as text."""

by_option = pytest.mark.parametrize("declared", list(options()), ids=lambda declared: declared.name)


def in_file(declared: Option, text: str) -> str:
    """The line of a configuration file that gives a text as the type that the file should hold."""
    value = text if str in declared.kind.stored else json.loads(text.replace("on", "true"))
    literal = json.dumps([value] if declared.repeatable else value)
    return f"{declared.key} = {literal}\n"


def test_every_setting_has_its_values_here() -> None:
    assert list(VALUES) == [declared.name for declared in options()]


@by_option
def test_flag_environment_and_file_say_the_same(declared: Option, tmp_path: Path) -> None:
    if not declared.in_file:
        return
    right = VALUES[declared.name][0]
    by_environment = resolve({}, {declared.environment_name: right})
    assert getattr(by_environment, declared.name) != declared.default
    by_flag = resolve({declared.name: [right] if declared.repeatable else right}, {})
    (tmp_path / "c.toml").write_text(in_file(declared, right))
    by_file = dataclasses.replace(resolve({"config": str(tmp_path / "c.toml")}, {}), config=None)
    assert by_flag == by_environment == by_file


@by_option
@pytest.mark.parametrize("way", ["flag", "environment", "file", "type"])
def test_a_wrong_value_names_key_value_and_what_is_allowed(declared: Option, way: str, tmp_path: Path) -> None:
    wrong, file = VALUES[declared.name][1], tmp_path / "c.toml"
    flags: dict[str, Any] = {}
    environment, key, got = {}, declared.flag, repr(wrong)
    match way:
        case "flag":
            flags[declared.name] = [wrong] if declared.repeatable else wrong
        case "environment":
            environment[declared.environment_name] = wrong
            key = declared.environment_name
        case "file" | "type":
            if not declared.in_file:
                return
            key, flags["config"] = f"{file}:2: {declared.key}", str(file)
            literal = json.dumps([wrong] if declared.repeatable else wrong)
            if way == "type":
                literal = "1979-05-27"
                got = repr(datetime.date(1979, 5, 27))
            file.write_text(f"# a comment\n{declared.key} = {literal}\n")
    if declared.secret:
        got = "another value"
    with pytest.raises(ConfigError) as caught:
        resolve(flags, environment)
    listed = "a list, each item " if way == "type" and declared.repeatable else ""
    assert str(caught.value) == f"{key} must be {listed}{declared.kind.allowed}, got {got}."


@by_option
def test_the_command_line_says_what_is_wrong(declared: Option) -> None:
    wrong = VALUES[declared.name][1]
    arguments = [wrong] if declared.positional else [declared.flag, wrong]
    if declared.is_switch:
        arguments = [f"{declared.flag}={wrong}"]
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert declared.flag in result.output and "Traceback" not in result.output
    assert declared.secret or declared.is_switch or repr(wrong) in result.output


def test_an_environment_of_commas_is_no_list() -> None:
    """It would mean that no key is needed."""
    with pytest.raises(ConfigError, match="SERAPH_API_KEY must be a text that is not empty, got another value"):
        resolve({}, {"SERAPH_API_KEY": " , "})


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        resolve({"max_num_seqs": "64", "max_num_batched_tokens": "8"}, {}).engine_configs()


def test_the_engine_is_told_every_setting_it_has() -> None:
    changed = resolve(
        {
            "model": ["x.gguf"],
            "max_model_len": "100",
            "max_num_seqs": "3",
            "max_num_batched_tokens": "9",
            "kv_cache_memory": "1GiB",
            "kv_cache_dtype": "int8",
            "quantization": "int8",
            "prefix_caching": False,
            "speculation": "off",
            "huge_pages": "on",
            "threads": "2",
            "tensor_parallel_size": "2",
            "stall_timeout": "5",
            "isa": "avx2",
        },
        {},
    ).engine_config("x.gguf")
    default = EngineConfig()
    same = {f.name for f in dataclasses.fields(default) if getattr(changed, f.name) == getattr(default, f.name)}
    assert same == {"home", "embedding_model", "kv_cache_tokens"}  # the last is another way to say kv_cache_memory


@pytest.mark.parametrize(
    "flags",
    [
        {"engine": "native", "vllm_arg": ["a=b"]},
        {"engine": "native", "pipeline_parallel_size": "2"},
        {"engine": "vllm", "threads": "2"},
        {"engine": "vllm", "isa": "avx2"},
        {"engine": "vllm", "embedding_model": "x.gguf"},
        {"engine": "vllm", "quantization": "int8"},
    ],
    ids=lambda flags: "-".join(flags),
)
def test_settings_of_the_other_engine_are_refused(flags: dict[str, Any]) -> None:
    *_, name = flags
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-") + r".* is not for --engine " + flags["engine"]):
        resolve(flags, {}).need_one_engine()


def test_vllm_is_told_what_both_engines_have() -> None:
    settings = resolve(
        {
            "engine": "vllm",
            "max_model_len": "100",
            "max_num_seqs": "3",
            "max_num_batched_tokens": "9",
            "tensor_parallel_size": "2",
            "pipeline_parallel_size": "4",
            "prefix_caching": False,
            "quantization": "none",
            "vllm_arg": ["dtype=float32", "enforce-eager=true"],
        },
        {},
    )
    settings.need_one_engine()
    assert settings.vllm_options(Path("/m"), "m", pooling=False, kv_cache_bytes=7) == VllmOptions(
        folder=Path("/m"),
        model="m",
        max_model_len=100,
        max_num_seqs=3,
        max_num_batched_tokens=9,
        tensor_parallel_size=2,
        pipeline_parallel_size=4,
        kv_cache_bytes=7,
        enable_prefix_caching=False,
        arguments=(("dtype", "float32"), ("enforce-eager", "true")),
    )
    with pytest.raises(ConfigError, match="KEY=VALUE, got 'dtype'"):
        resolve({"vllm_arg": ["dtype"]}, {}).vllm_options(Path("/m"), "m", pooling=False, kv_cache_bytes=None)


def test_an_engine_computes_so_many_requests_at_once() -> None:
    assert resolve({"engine": "native"}, {}).max_running == 64 == resolve({}, {}).engine_config("x").max_num_seqs
    assert resolve({"engine": "vllm"}, {}).max_running == 256
    assert resolve({"engine": "vllm", "max_num_seqs": "3"}, {}).max_running == 3


def test_every_setting_is_declared_once_and_in_full() -> None:
    declared = list(options())
    assert [one.name for one in declared] == [field.name for field in dataclasses.fields(Settings)]
    for one in declared:
        assert one.help.endswith(".") and one.environment_name.startswith("SERAPH_")
        if one.repeatable:
            assert one.default == (() if not one.positional else (DEFAULT_MODEL,))


def test_misspelled_environment_names_are_found() -> None:
    environment = {"SERAPH_PORT": "1", "SERAPH_PROT": "1", "SERAPH_HOME": "/x", "HOME": "/y", "SERAPH_LOG_LEVEL": ""}
    assert unknown_environment(environment) == {"SERAPH_LOG_LEVEL": "SERAPH_LOG", "SERAPH_PROT": "SERAPH_PORT"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, [("smollm2-135m-instruct",)]),
        ({"model": ("/models/a.gguf",)}, [("a",)]),
        ({"model": ("pypi:dist==1/pkg/b.gguf",)}, [("b",)]),
        ({"model": ("/models/a.gguf",), "served_model_name": ("big", "small")}, [("big", "small")]),
        ({"model": ("/models/a.gguf", "b.gguf"), "embedding_model": "c.gguf"}, [("a",), ("b",), ("c",)]),
        ({"model": ("/x/a.gguf", "/y/a.gguf"), "served_model_name": ("x", "y")}, [("x",), ("y",)]),
    ],
)
def test_model_names(changes: dict[str, Any], names: list[tuple[str, ...]]) -> None:
    assert Settings(**changes).model_names == names


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ("/x/a.gguf", "/y/a.gguf")}, "Two models would be called 'a': give each a name of its own"),
        ({"model": ("a.gguf",), "embedding_model": "/y/a.gguf"}, "Two models would be called 'a'"),
        ({"model": ("a.gguf", "b.gguf"), "served_model_name": ("x",)}, "must name each of the 2 models once"),
        ({"model": ("a.gguf", "b.gguf"), "served_model_name": ("x", "x")}, "Two models would be called 'x'"),
        ({"model": ()}, "at least one model"),
        ({"api_key": ("same", "k"), "admin_key": ("same",)}, "--admin-key and --api-key must differ"),
    ],
)
def test_names_and_keys_that_do_not_go_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**changes)


def test_several_models(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('model = ["a.gguf", "b.gguf"]\nembedding-model = "c.gguf"\n')
    for settings in (
        resolve({"model": ["a.gguf", "b.gguf"], "embedding_model": "c.gguf"}, {}),
        resolve({}, {"SERAPH_MODEL": "a.gguf, b.gguf", "SERAPH_EMBEDDING_MODEL": "c.gguf"}),
        resolve({"config": str(tmp_path / "c.toml")}, {}),
    ):
        assert (settings.model, settings.embedding_model) == (("a.gguf", "b.gguf"), "c.gguf")
        assert settings.engine_config("b.gguf").model == "b.gguf"
        first, second = settings.engine_configs()
        assert (first.model, first.embedding_model) == ("a.gguf", "c.gguf")
        assert (second.model, second.embedding_model) == ("b.gguf", None)


def generation_config(text: str) -> dict[str, float] | None:
    return resolve({"generation_config": text}, {}).generation_defaults()


def test_a_generation_config_is_a_file_a_folder_or_an_object(tmp_path: Path) -> None:
    wanted = {"temperature": 0.6, "top_p": 0.9, "max_tokens": 100}
    stated = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 100, "transformers_version": "4.4", "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    for text in (str(tmp_path), str(tmp_path / "generation_config.json"), json.dumps(stated)):
        assert generation_config(text) == wanted
    assert generation_config("auto") is None
    assert generation_config("none") == {}
    assert generation_config('{"do_sample": false}') == {"temperature": 0.0}


def test_a_wrong_generation_config_names_its_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    for text, said in (
        ('{"temperature": 3}', f"--generation-config: {file}: temperature must be a number from 0 to 2, found 3"),
        ("[1]", f"got '{file}': {file} is no JSON object"),
        ("{", f"got '{file}': {file} is not JSON: Expecting property name"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            generation_config(str(file))
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="must be auto, none, the path of"):
        generation_config(str(tmp_path / "other.json"))


def test_what_a_generation_config_asks_in_vain_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert generation_config('{"num_beams": 4, "top_k": 5}') == {"top_k": 5}
    assert "num_beams" in caplog.text


def test_a_template_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "template"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve({"chat_template": str(file)}, {}).chat_template_source()
    file.write_text("{{ messages }}")
    assert resolve({"chat_template": str(file)}, {}).chat_template_source() == "{{ messages }}"


def test_only_settings_read_the_environment() -> None:
    for path in SERVER.rglob("*.py"):
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name not in {"environ", "getenv"}, f"{path}:{getattr(node, 'lineno', 0)}"
