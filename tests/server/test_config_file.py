"""Configuration files: what beats what, and errors that name file, line, key and the nearest key there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from server.settings import Settings, resolve


def load(tmp_path: Path, text: str | bytes, environment: dict[str, str] | None = None, **flags: Any) -> Settings:
    file = tmp_path / "seraph.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve({"config": str(file), **flags}, environment or {})


def test_flags_beat_the_environment_which_beats_the_file_which_beats_defaults(tmp_path: Path) -> None:
    text = "port = 1\nmax-num-seqs = 2\nthreads = 3\napi-key = ['file']\n"
    environment = {"SERAPH_PORT": "10", "SERAPH_MAX_NUM_SEQS": "20", "SERAPH_API_KEY": "environment"}
    settings = load(tmp_path, text, environment, port="100")
    assert (settings.port, settings.max_num_seqs, settings.threads, settings.max_waiting) == (100, 20, 3, 512)
    assert settings.api_key == ("environment",)


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("port = 1\n")
    assert resolve({}, {"SERAPH_CONFIG": str(tmp_path / "a.toml")}).port == 1


def test_keys_are_written_with_either_dash(tmp_path: Path) -> None:
    settings = load(tmp_path, "max_num_seqs = 2\n'max-waiting' = 3\n")
    assert (settings.max_num_seqs, settings.max_waiting) == (2, 3)


def test_values_have_types_of_their_own(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "insecure = true\nbody-timeout = 2\nkv-cache-memory = 1048576\nserved-model-name = ['a', 'b']\n"
        "generation-config = { temperature = 0.5 }\n",
    )
    assert (settings.insecure, settings.body_timeout, settings.kv_cache_memory) == (True, 2.0, "1048576")
    assert settings.served_model_name == ("a", "b")
    assert settings.generation_defaults() == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 1\nmax-num-seq = 2\n", ":2: max-num-seq is not a setting; the nearest one is max-num-seqs."),
        ("\n\nkv_cache_token = 2\n", ":3: kv_cache_token is not a setting; the nearest one is kv-cache-tokens."),
        ("config = 'other.toml'\n", ":1: config is not a setting; the nearest one is generation-config."),
        ("[server]\nport = 1\n", ":1: server is not a setting; the nearest one is "),
        ("max-waiting = 1\nmax_waiting = 2\n", ":2: max_waiting is given twice, with - and with _."),
        ("port = 1\nport = 2\n", " is not a TOML file: Cannot overwrite a value (at line 2"),
        ("port = \n", " is not a TOML file: Invalid value (at line 1, column 8)."),
        ("port = '8000'\n", ":1: port must be a whole number between 0 and 65535, got '8000'."),
        ("port = true\n", ":1: port must be a whole number between 0 and 65535, got True."),
        ("insecure = 1\n", ":1: insecure must be true or false, got 1."),
        ("body-timeout = nan\n", ":1: body-timeout must be a number of seconds between 0.05 and 3600, got nan."),
        ("api-key = 'secret'\n", ":1: api-key must be a list, each item a text that is not empty, got another value."),
        ("api-key = ['a', 7]\n", ":1: api-key must be a text that is not empty, got another value."),
        ("generation-config = { a = 1979-05-27 }\n", ":1: generation-config must be auto, none"),
        ("served-model-name = [\n 'a',\n 1\n]\n", ":1: served-model-name must be a text that is not empty, got 1."),
    ],
)
def test_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'seraph.toml'}{said}")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_what_is_no_toml(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="is not a TOML file"):
        load(tmp_path, content)


def test_a_line_is_named_only_where_it_is_certain(tmp_path: Path) -> None:
    text = f"chat-template = '{__file__}'\nserved-model-name = ['''\nport = 1\n''']\nport = 'x'\n"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'seraph.toml'}: port must be")
