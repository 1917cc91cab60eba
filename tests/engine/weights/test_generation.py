from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.errors import FormatError
from engine.weights.generation import defaults_from_config, defaults_from_gguf

PATH = Path("generation_config.json")


@pytest.mark.parametrize(
    ("values", "defaults"),
    [
        ({}, {}),
        ({"bos_token_id": 1, "eos_token_id": [2, 3], "transformers_version": "5.0", "max_length": 4096}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_new_tokens": 512},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 512},
        ),
        (
            {"repetition_penalty": 1.1, "presence_penalty": -2, "frequency_penalty": 0.5},
            {"repetition_penalty": 1.1, "presence_penalty": -2.0, "frequency_penalty": 0.5},
        ),
        ({"temperature": None, "top_k": None}, {}),
        ({"top_k": 0}, {}),  # off, as it is without
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"num_beams": 1, "typical_p": 1.0, "penalty_alpha": None}, {}),
    ],
)
def test_what_a_configuration_says(
    values: dict[str, object], defaults: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = defaults_from_config(values, PATH)
    assert found == defaults
    assert {name: type(value) for name, value in found.items()} == {
        name: int if name in ("top_k", "max_tokens") else float for name in defaults
    }
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temperature", 2.5, "temperature must be a number from 0 to 2, found 2.5"),
        ("temperature", -0.1, "temperature must be a number from 0 to 2, found -0.1"),
        ("temperature", float("nan"), "found nan"),
        ("temperature", "0.7", "found '0.7'"),
        ("temperature", True, "found True"),
        ("temperature", [0.7], r"found \[0.7\]"),
        ("temperature", 10**400, "temperature must be a number from 0 to 2, found 1000"),
        ("top_p", 0, "top_p must be a number above 0, at most 1, found 0"),
        ("top_p", 1.01, "top_p must be"),
        ("min_p", 2, "min_p must be a number from 0 to 1, found 2"),
        ("top_k", -2, "top_k must be a whole number from -1 up, found -2"),
        ("top_k", 1.5, "top_k must be a whole number from -1 up, found 1.5"),
        ("top_k", float("inf"), "found inf"),
        ("repetition_penalty", 0, "repetition_penalty must be a number above 0, at most 10, found 0"),
        ("presence_penalty", 3, "presence_penalty must be a number from -2 to 2, found 3"),
        ("frequency_penalty", {}, "frequency_penalty must be a number from -2 to 2"),
        ("max_new_tokens", 0, "max_new_tokens must be a whole number from 1 up, found 0"),
        ("do_sample", 1, "do_sample must be true or false, found 1"),
    ],
)
def test_values_that_cannot_be_are_named(key: str, value: object, message: str) -> None:
    with pytest.raises(FormatError, match=f"^generation_config.json: .*{message}") as caught:
        defaults_from_config({key: value}, PATH)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_beams", 4), ("penalty_alpha", 0.6), ("typical_p", 0.9), ("no_repeat_ngram_size", 3), ("num_beams", [4])],
)
def test_other_ways_of_decoding_are_said_to_have_no_effect(
    key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert defaults_from_config({key: value}, PATH) == {}
    assert [record.getMessage() for record in caplog.records] == [
        f"generation_config.json: {key} {value!r} is not implemented and has no effect"
    ]


def test_gguf_has_keys_of_its_own() -> None:
    metadata = {
        "general.name": "tiny",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.95,
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.05,
        "temperature": 9,
    }
    assert defaults_from_gguf(metadata, Path("m.gguf")) == {
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
    }
    with pytest.raises(FormatError, match=r"^m.gguf: general.sampling.temp must be a number from 0 to 2, found 3"):
        defaults_from_gguf({"general.sampling.temp": 3}, Path("m.gguf"))
