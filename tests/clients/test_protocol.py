from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from seraph_client import LoadedModel, Model, ModelFailedError, ProtocolError, Timeouts, protocol
from seraph_client.options import ChatOptions, CompletionOptions, EmbedOptions, TextOptions
from tests.live import ROOT


@pytest.mark.parametrize("base_url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_base_url_with_or_without_v1(base_url: str) -> None:
    assert protocol.normalize_base_url(base_url) == "http://h:1"


def test_options_become_fields() -> None:
    call = protocol.chat("Hi", "m", {"temperature": 0, "extra": {"new": 1}, "model": "other", "timeout": 3})
    assert call.body == {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "new": 1}
    call = protocol.complete([1, 2], "m", {}, stream=True)
    assert call.body == {"model": "m", "prompt": [1, 2], "stream": True, "stream_options": {"include_usage": True}}


def test_fields_of_requests_about_texts() -> None:
    assert protocol.embed(["a"], "m", {"dimensions": 8}).body == {
        "model": "m", "input": ["a"], "encoding_format": "base64", "dimensions": 8,
    }  # fmt: skip
    assert protocol.embed("a", "m", {"encoding_format": "float"}).body == {
        "model": "m", "input": "a", "encoding_format": "float",
    }  # fmt: skip
    assert protocol.score("a", ["b"], "m", {"priority": 1}).body == {
        "model": "m", "text_1": "a", "text_2": ["b"], "priority": 1,
    }  # fmt: skip
    assert protocol.rerank("q", ["a"], "m", {}, top_n=1, return_documents=False).body == {
        "model": "m", "query": "q", "documents": ["a"], "top_n": 1, "return_documents": False,
    }  # fmt: skip
    assert protocol.tokenize("a", "m", {"add_special_tokens": False}).body == {
        "model": "m", "prompt": "a", "add_special_tokens": False,
    }  # fmt: skip
    assert protocol.tokenize([{"role": "user", "content": "a"}], "m", {}).body == {
        "model": "m", "messages": [{"role": "user", "content": "a"}],
    }  # fmt: skip


NOT_OPTIONS = {
    "chat/completions": {"messages", "stream", "stream_options", "max_completion_tokens"},  # max_tokens by a newer name
    "completions": {"prompt", "stream", "stream_options"},
    "embeddings": {"input"},
    "score": {"text_1", "text_2"},
}
"""What the client writes itself, or has under another name."""

OLDER_NAMES = {"guided_json", "guided_regex", "guided_choice", "guided_grammar"}  # of structured_outputs


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("chat/completions", ChatOptions),
        ("completions", CompletionOptions),
        ("embeddings", EmbedOptions),
        ("score", TextOptions),
    ],
)
def test_every_field_of_the_api_is_an_option(path: str, options: Any) -> None:
    section = (ROOT / "docs" / "api.md").read_text().partition(f"## POST /v1/{path}\n")[2].partition("\n##")[0]
    fields = dict(re.findall(r"^\| `(\w+)` \| (works|hint) \|", section, re.MULTILINE))
    named = options.__optional_keys__ - {"timeout", "extra"}
    working = {name for name, what in fields.items() if what == "works"} - OLDER_NAMES
    assert len(working) > 4 and working == named - {"user"} | NOT_OPTIONS[path]
    assert "user" in fields


def test_names_in_paths() -> None:
    assert protocol.model("hf:org/name").path == "/v1/models/hf%3Aorg/name"
    assert protocol.loaded_model("a b?#%").path == "/admin/models/a%20b%3F%23%25"


def test_only_what_changes_the_server_is_not_repeatable() -> None:
    assert not protocol.load("a", name=None, kv_cache_memory=None).repeatable
    assert not protocol.unload("a", drain=None).repeatable
    assert protocol.chat("a", "m", {}).repeatable
    assert protocol.LOADED_MODELS.repeatable


def test_the_operator_s_requests() -> None:
    load = protocol.load("pypi:x", name="n", kv_cache_memory="10%")
    assert (load.by_operator, load.body) == (True, {"model": "pypi:x", "name": "n", "kv_cache_memory": "10%"})
    assert protocol.load("x", name=None, kv_cache_memory=None).body == {"model": "x"}
    assert protocol.unload("n", drain=1.5).params == {"drain": "1.5"}


def test_the_first_model_of_a_kind() -> None:
    models = [Model("e", kind="embed"), Model("g", kind="generate"), Model("s", kind="score")]
    assert [protocol.first_of_kind(models, kind) for kind in ("generate", "embed", "score", None)] == [
        "g",
        "e",
        "s",
        "e",
    ]
    assert protocol.first_of_kind([Model("x")], "generate") == "x"
    with pytest.raises(ProtocolError, match="no model of the kind 'embed'"):
        protocol.first_of_kind([Model("x")], "embed")
    with pytest.raises(ProtocolError, match=r"no model\."):
        protocol.first_of_kind([], None)


def loaded(state: str, **fields: Any) -> LoadedModel:
    """A model in this state."""
    return LoadedModel(
        **{
            "name": "m", "names": ("m",), "source": "x", "kind": None, "state": state, "reason": None, "progress": None,
            "host": None, "pid": None, "weights_bytes": 0, "kv_cache_bytes": 0, "kv_cache_tokens": 0,
            "max_model_len": None, **fields,
        }
    )  # fmt: skip


def test_waiting_for_a_model() -> None:
    assert [protocol.is_ready(loaded(state)) for state in ("fetching", "packing", "starting", "restarting")] == [
        False
    ] * 4
    assert protocol.is_ready(loaded("ready"))
    with pytest.raises(ModelFailedError, match="'m' failed to load: no such file"):
        protocol.is_ready(loaded("failed", reason="no such file"))
    with pytest.raises(ModelFailedError, match=r"'m' died too often\."):
        protocol.is_ready(loaded("dead"))


def test_a_number_is_the_whole_call_s_time() -> None:
    assert protocol.as_timeouts(3) == Timeouts(total=3)
    assert protocol.as_timeouts(Timeouts(read=3)) == Timeouts(read=3)


def test_the_version_is_the_distribution_s() -> None:
    declared = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text())
    assert protocol.headers(None)["user-agent"] == f"seraph-client/{declared['project']['version']}"
