"""Settings: what beats what, and errors that name key, value and what is allowed."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
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


@pytest.mark.parametrize(
    ("flags", "environment", "said"),
    [
        ({"port": "70000"}, {}, "--port must be a whole number between 0 and 65535, got '70000'."),
        ({}, {"SERAPH_PORT": "http"}, "SERAPH_PORT must be a whole number between 0 and 65535, got 'http'."),
        ({"model": " "}, {}, "MODEL must be a text that is not empty, got ' '."),
        ({}, {"SERAPH_INSECURE": "maybe"}, "SERAPH_INSECURE must be true or false, got 'maybe'."),
        ({"isa": "sse"}, {}, "--isa must be one of auto, avx512"),
        ({"keep_alive_interval": "nan"}, {}, "--keep-alive-interval must be a number of seconds between"),
        ({"chat_template": "/no/such/file"}, {}, "--chat-template must be the path of an existing file"),
        ({"max_num_seqs": "1.5"}, {}, "--max-num-seqs must be a whole number"),
    ],
)
def test_wrong_values(flags: dict[str, Any], environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(flags, environment)
    assert str(caught.value).startswith(said)


def test_keys_are_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"api_key": [" \t"]}, {})
    assert str(caught.value) == "--api-key must be a text that is not empty, got another value."


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        resolve({"max_num_seqs": "64", "max_num_batched_tokens": "8"}, {}).engine_config()


def test_the_engine_is_told_every_setting_it_has() -> None:
    changed = resolve(
        {
            "model": "x.gguf",
            "max_model_len": "100",
            "max_num_seqs": "3",
            "max_num_batched_tokens": "9",
            "kv_cache_memory": "1GiB",
            "quantization": "int8",
            "prefix_caching": False,
            "threads": "2",
            "isa": "avx2",
        },
        {},
    ).engine_config()
    default = EngineConfig()
    same = {f.name for f in dataclasses.fields(default) if getattr(changed, f.name) == getattr(default, f.name)}
    assert same == {"home", "kv_cache_tokens"}  # the other way to say kv_cache_memory


def test_every_setting_is_declared_once_and_in_full() -> None:
    declared = list(options())
    assert [one.name for one in declared] == [field.name for field in dataclasses.fields(Settings)]
    for one in declared:
        assert one.help.endswith(".") and one.environment_name.startswith("SERAPH_")
        if one.repeatable:
            assert one.default == ()


def test_misspelled_environment_names_are_found() -> None:
    environment = {"SERAPH_PORT": "1", "SERAPH_PROT": "1", "SERAPH_HOME": "/x", "HOME": "/y", "SERAPH_LOG_LEVEL": ""}
    assert unknown_environment(environment) == {"SERAPH_LOG_LEVEL": "SERAPH_LOG", "SERAPH_PROT": "SERAPH_PORT"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ("smollm2-135m-instruct",)),
        ({"model": "/models/a.gguf"}, ("a",)),
        ({"model": "pypi:dist==1/pkg/b.gguf"}, ("b",)),
        ({"model": "/models/a.gguf", "served_model_name": ("big", "small")}, ("big", "small")),
    ],
)
def test_model_names(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    assert Settings(**changes).model_names == names


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
