"""Offline, a call without sampling parameters samples as the checkpoint says; given parameters stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from tests.tiny_gguf import TinyLlama


def write(path: Path, **sampling: float) -> str:
    model = TinyLlama()
    model.metadata |= {f"general.sampling.{name}": value for name, value in sampling.items()}
    return str(model.write(path))


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    source = write(tmp_path / "t.gguf", temp=0.0, top_k=7, penalty_repeat=1.25)
    return LLM(source, home=tmp_path, kv_cache_memory="1MiB", threads=1, progress=False)


def test_what_the_checkpoint_says(llm: LLM) -> None:
    with llm:
        default = llm.default_sampling()
        assert default == SamplingParams(temperature=0.0, top_k=7, repetition_penalty=1.25)
        assert isinstance(default.top_k, int)
        (by_default,) = llm.generate("The sea", progress=False)
        (asked,) = llm.generate("The sea", default, progress=False)
        (plain,) = llm.generate("The sea", SamplingParams(temperature=0.0), progress=False)
        assert by_default.token_ids == asked.token_ids != plain.token_ids
        assert "".join(llm.stream("The sea")) == by_default.text


def test_a_checkpoint_that_says_nothing(tmp_path: Path) -> None:
    with LLM(write(tmp_path / "t.gguf"), home=tmp_path, kv_cache_tokens=256, threads=1, progress=False) as llm:
        assert llm.default_sampling() == SamplingParams()


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    source = write(tmp_path / "t.gguf")
    with pytest.raises(ConfigError, match=r"kv_cache_memory must be at least .*, got '1KB'"):
        LLM(source, home=tmp_path, kv_cache_memory="1KB", progress=False)
    with pytest.raises(ConfigError, match="kv_cache_memory must be at most"):
        LLM(source, home=tmp_path, kv_cache_memory="900TiB", progress=False)
