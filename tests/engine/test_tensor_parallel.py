"""Requests get the same tokens from any number of ranks, whatever the heads and columns that these have to divide."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.kernels import available_isas, create_program
from engine.kernels.batch import Program
from engine.ranks import Ranks
from engine.request import Request, SamplingParams
from engine.weights import PackedModel, load_model
from tests.tiny_families import tiny_folder, tiny_gguf
from tests.tiny_gguf import write_tiny_llama

NUM_PROMPTS = 50
SIZES = (1, 2, 3)

# Three query heads over one KV head: of three ranks two have none of it. 96 and 160 columns are three and five halves
# of strips. The families bring windows, soft caps and norms afterwards, and experts.
MODELS: dict[str, dict[str, int]] = {
    "three heads": {"hidden": 96, "heads": 3, "kv_heads": 1, "head_dim": 32, "ffn": 160},
    "mistral": {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96},
    "gemma2": {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96},
    "mixtral": {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PackedModel]:
    home = tmp_path_factory.mktemp("home")
    path, sizes = home / "tiny.gguf", MODELS[request.param]
    if request.param == "three heads":
        write_tiny_llama(path, layers=2, context=300, tie=False, **sizes)  # type: ignore[arg-type]
    else:
        folder = tiny_folder(request.param, layers=2, context=300, **sizes)
        tiny_gguf(request.param, folder, "Q4_1", head_dim=sizes["head_dim"]).write(path)
    loaded = load_model(str(path), home=home)
    yield loaded
    loaded.close()


def prompts_of(model: PackedModel, *, longest: int, max_tokens: int) -> list[Request]:
    """50 prompts, every other one greedy, some with a common beginning, so that blocks are shared and copied."""
    rng = random.Random(11)
    vocab = model.info.spec.vocab_size
    shared = [rng.randrange(3, vocab) for _ in range(longest)]
    made = []
    for index in range(NUM_PROMPTS):
        length = rng.randrange(1, longest)
        own = [rng.randrange(3, vocab) for _ in range(length)]
        kept = rng.randrange(length) if index % 3 == 0 else 0
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if index % 2 == 0 else 0.9,
            top_p=1.0 if index % 4 == 1 else 0.95,
            ignore_eos=True,
        )
        made.append(
            Request(
                request_id=f"r{index}",
                model=model.name,
                prompt_token_ids=shared[:kept] + own[kept:],
                sampling=sampling,
                seed=rng.getrandbits(64),
            )
        )
    return made


def tokens_of(model: PackedModel, requests: list[Request], size: int, **config: Any) -> dict[str, list[int]]:
    """Every request's tokens from so many ranks, of a thread each."""
    fields: dict[str, Any] = {"threads": size, "max_num_seqs": 24, "max_num_batched_tokens": 64} | config
    create = fields.pop("create", create_program)
    core = EngineCore(EngineConfig(tensor_parallel_size=size, kv_cache_tokens=6400, **fields), model, create=create)
    assert core.capabilities().num_ranks == size
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    try:
        for request in requests:
            core.add(request)
        while core.has_work:
            for delta in core.step():
                assert delta.error is None
                tokens[delta.request_id] += delta.token_ids
        core.check_integrity()
    finally:
        core.close()
    return tokens


def copying(*arguments: Any, ranks: Ranks, **how: Any) -> Program:
    """`create_program` as on a machine with several NUMA nodes."""
    return create_program(*arguments, ranks=dataclasses.replace(ranks, copy_weights=True), **how)


@pytest.mark.parametrize("isa", available_isas())
def test_any_number_of_ranks_gives_the_same_tokens(model: PackedModel, isa: str) -> None:
    requests = prompts_of(model, longest=90, max_tokens=8)
    how: dict[str, Any] = {"isa": isa, "kv_cache_dtype": "int8" if isa == "avx2" else "bf16"}
    one, two, three = (tokens_of(model, requests, size, **how) for size in SIZES)
    assert two == one
    assert three == one
    assert len({tuple(tokens) for tokens in one.values()}) > NUM_PROMPTS // 2, "the same for everybody says little"
    uneven = tokens_of(model, requests[::5], 2, threads=3, create=copying, **how)
    assert uneven == {name: one[name] for name in uneven}


def test_more_ranks_than_query_heads_are_refused(model: PackedModel) -> None:
    heads = model.info.spec.num_heads
    with pytest.raises(ConfigError, match=f"tensor_parallel_size must be at most {heads}, .* got {heads + 1}"):
        EngineCore(EngineConfig(tensor_parallel_size=heads + 1), model)


def test_the_reference_has_no_ranks_and_ignores_how_many_are_wanted(model: PackedModel) -> None:
    core = EngineCore(EngineConfig(tensor_parallel_size=2, isa="reference", kv_cache_tokens=640), model)
    assert (core.capabilities().num_ranks, core.capabilities().threads) == (1, 1)
    core.close()


@pytest.mark.full
def test_the_default_model(default_model: PackedModel) -> None:
    requests = prompts_of(default_model, longest=100, max_tokens=16)
    one, two, three = (tokens_of(default_model, requests, size) for size in SIZES)
    assert two == one
    assert three == one
