"""A request's tokens never depend on its company: not on batch, chunks, cache hits, preemption, slots or threads."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from engine.config import KV_DTYPES, EngineConfig
from engine.core import EngineCore
from engine.kernels import available_isas
from engine.kernels.layout import PackedTensor, dequantize, pack_bf16, to_bf16
from engine.request import EngineStats, Request, SamplingParams
from engine.weights import PackedModel, load_model
from tests.tiny_families import FAMILIES, tiny_folder, tiny_gguf
from tests.tiny_gguf import write_tiny_llama

NUM_REQUESTS = 32

Tokens = dict[str, list[int]]

# What every run but the first varies. `kv_cache_tokens` of the small ones holds a few requests of the 32.
COMPANY = {
    "chunks of 32": {"max_num_batched_tokens": 32, "max_num_seqs": 12},
    "chunks of 128": {"max_num_batched_tokens": 128},
    "chunks of 512": {"max_num_batched_tokens": 512},
    "chunks of 32, no cache": {"max_num_batched_tokens": 32, "max_num_seqs": 12, "enable_prefix_caching": False},
    "chunks of 512, no cache": {"max_num_batched_tokens": 512, "enable_prefix_caching": False},
    "preempted": {"max_num_batched_tokens": 128, "kv_cache_tokens": 448},
    "preempted, no cache": {"max_num_batched_tokens": 128, "kv_cache_tokens": 448, "enable_prefix_caching": False},
    "two threads": {"threads": 2},
    "two threads, preempted": {"threads": 2, "max_num_batched_tokens": 100, "kv_cache_tokens": 448},
}


def make_requests(model: PackedModel, *, longest: int, max_tokens: tuple[int, int]) -> list[Request]:
    """Mixed lengths around block and chunk borders, some with a common beginning; every way to sample.

    Every third request gets the first `max_tokens`, which must be long enough to outgrow what admission foresaw.
    """
    rng = random.Random(5)
    vocab = model.info.spec.vocab_size
    shared = [rng.randrange(3, vocab) for _ in range(100)]
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, longest - 1, longest]
    lengths += [rng.randrange(1, longest) for _ in range(NUM_REQUESTS - len(lengths))]
    samplings = (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logit_bias": {7: 5.0, 8: -100.0}, "min_tokens": 4},
        {"temperature": 0.6, "repetition_penalty": 1.1, "top_p": 0.95, "logit_bias": {9: 2.0}},
    )
    requests = []
    for index, length in enumerate(lengths):
        own = [rng.randrange(3, vocab) for _ in range(length)]
        prompt = (shared + own)[:length] if index % 3 == 0 else own
        sampling = SamplingParams(
            max_tokens=max_tokens[index % 3 != 0] - index % 5,
            ignore_eos=index % 4 != 0,
            **samplings[index % len(samplings)],
        )
        requests.append(
            Request(
                request_id=f"r{index}",
                model=model.name,
                prompt_token_ids=prompt,
                sampling=sampling,
                seed=rng.getrandbits(64),
                choice_index=index % 2,
            )
        )
    return requests


def run(model: PackedModel, batches: Iterable[list[Request]], **config: object) -> tuple[Tokens, EngineStats]:
    """Tokens of every request; the requests of one batch run together, batches one after another."""
    fields = {"threads": 1, "max_num_seqs": 32, "kv_cache_tokens": 32 * 600} | config
    core = EngineCore(msgspec.convert(fields, EngineConfig), model)
    tokens: Tokens = {}
    try:
        for batch in batches:
            for request in batch:
                tokens[request.request_id] = []
                core.add(request)
            while core.has_work:
                for delta in core.step():
                    tokens[delta.request_id] += delta.token_ids
                    assert delta.error is None
        core.check_integrity()
        stats = core.stats()
        assert stats.num_free_blocks == stats.num_blocks
        return tokens, stats
    finally:
        core.close()


def assert_same(tokens: Tokens, alone: Tokens) -> None:
    different = {name: (tokens[name], alone[name]) for name in alone if tokens[name] != alone[name]}
    assert not different, f"{len(different)} of {len(alone)} requests got other tokens than alone: {different}"


MODELS = ("4-bit", "bf16", *FAMILIES)
BUILDS = [{"isa": isa, "kv_cache_dtype": dtype} for isa in available_isas() for dtype in KV_DTYPES]
QUICK = ("4-bit", "qwen3")
"""Those that the portable build, ten times slower than others, is tried with in `make test`."""


def is_slow(name: str, build: dict[str, str]) -> bool:
    return build["isa"] == "portable" and name not in QUICK


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (name, build),
            id=f"{name}-{' '.join(build.values())}",
            marks=pytest.mark.full if is_slow(name, build) else (),
        )
        for name in MODELS
        for build in BUILDS
    ],
)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """A model and a build."""
    both: tuple[str, dict[str, str]] = request.param
    return both


@pytest.fixture(scope="module")
def build(case: tuple[str, dict[str, str]]) -> dict[str, str]:
    return case[1]


@pytest.fixture(scope="module")
def tiny_models() -> dict[str, PackedModel]:
    """Those that were made."""
    return {}


@pytest.fixture(scope="module")
def tiny_model(
    case: tuple[str, dict[str, str]],
    tiny_models: dict[str, PackedModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> PackedModel:
    name = case[0]
    if name not in tiny_models:
        tiny_models[name] = make_model(name, tmp_path_factory.mktemp("home"))
    return tiny_models[name]


def make_model(name: str, home: Path) -> PackedModel:
    path = home / "tiny.gguf"
    if name in FAMILIES:
        folder = tiny_folder(name, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, context=1200)
        tiny_gguf(name, folder, "Q4_1", head_dim=16).write(path)
    else:
        write_tiny_llama(path, hidden=96, layers=2, heads=6, kv_heads=2, ffn=160, context=1200, tie=False)
    model = load_model(str(path), home=home)
    if name == "bf16":
        model.weights = {name: in_bf16(tensor) for name, tensor in model.weights.items()}
    return model


def in_bf16(tensor: PackedTensor) -> PackedTensor:
    if tensor.format is None:
        return tensor
    return PackedTensor(*pack_bf16(to_bf16(dequantize(tensor.format, tensor.data.view(np.uint8)))))


@pytest.fixture(scope="module")
def tiny_requests(tiny_model: PackedModel) -> list[Request]:
    return make_requests(tiny_model, longest=300, max_tokens=(96, 40))


@pytest.fixture(scope="module")
def alone(tiny_model: PackedModel, tiny_requests: list[Request], build: dict[str, str]) -> Tokens:
    """Each request with nobody beside it, its prompt in one piece, nothing reused, nothing guessed."""
    batches = [[request] for request in tiny_requests]
    return run(tiny_model, batches, **build, enable_prefix_caching=False, speculation="off")[0]


@pytest.mark.parametrize("company", COMPANY)
def test_tokens_do_not_depend_on_company(
    tiny_model: PackedModel, tiny_requests: list[Request], build: dict[str, str], alone: Tokens, company: str
) -> None:
    config = COMPANY[company]
    tokens, stats = run(tiny_model, [tiny_requests], **build, **config)
    assert_same(tokens, alone)
    assert (stats.num_preemptions > 0) == ("kv_cache_tokens" in config)
    if not config.get("enable_prefix_caching", True):
        assert stats.num_cached_tokens == 0


def test_tokens_do_not_depend_on_what_is_cached(
    tiny_model: PackedModel, tiny_requests: list[Request], build: dict[str, str], alone: Tokens
) -> None:
    """A second time, all of the prompt and of the answer that can be reused is."""
    again = [msgspec.structs.replace(request, request_id=f"{request.request_id} again") for request in tiny_requests]
    tokens, stats = run(tiny_model, [tiny_requests, again], **build)
    assert_same(tokens, alone | {f"{name} again": output for name, output in alone.items()})
    assert stats.num_cached_tokens >= sum((len(r.prompt_token_ids) - 1) // 32 * 32 for r in again)


def test_tokens_do_not_depend_on_order_or_on_being_resumed(
    tiny_model: PackedModel, tiny_requests: list[Request], build: dict[str, str], alone: Tokens
) -> None:
    shuffled = random.Random(1).sample(tiny_requests, len(tiny_requests))
    done = {request.request_id: index % len(alone[request.request_id]) for index, request in enumerate(shuffled)}
    resumed = [
        msgspec.structs.replace(request, output_token_ids=alone[name][: done[name]])
        for request in shuffled
        for name in [request.request_id]
    ]
    tokens, _ = run(tiny_model, [resumed], **build, max_num_batched_tokens=64)
    assert_same({name: alone[name][: done[name]] + rest for name, rest in tokens.items()}, alone)


def test_tokens_do_not_depend_on_guesses(
    tiny_model: PackedModel, tiny_requests: list[Request], build: dict[str, str], alone: Tokens
) -> None:
    """Prompts that hold the answers, so that many guesses are right; some, with another seed, are wrong again."""
    telling = [
        msgspec.structs.replace(request, prompt_token_ids=[*request.prompt_token_ids, *alone[request.request_id]] * 2)
        for request in tiny_requests
    ]
    batches = [[request] for request in telling]
    expected, _ = run(tiny_model, batches, **build, speculation="off")
    tokens, stats = run(tiny_model, batches, **build)
    assert_same(tokens, expected)
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    together, _ = run(tiny_model, [telling[index : index + 3] for index in range(0, NUM_REQUESTS, 3)], **build)
    assert_same(together, expected)


def test_seeds_choices_and_samplers_really_differ(alone: Tokens) -> None:
    """The comparison above says little if everybody gets the same tokens anyway."""
    assert len({tuple(tokens) for tokens in alone.values()}) == NUM_REQUESTS
    assert sum(len(set(tokens)) > len(tokens) // 3 for tokens in alone.values()) > NUM_REQUESTS // 2


def test_a_prefix_of_a_thousand_tokens_is_computed_once(tiny_model: PackedModel, build: dict[str, str]) -> None:
    prefix = [3 + index % 300 for index in range(1000)]
    first, second = (
        Request(
            request_id=name,
            model=tiny_model.name,
            prompt_token_ids=[*prefix, 5 + index, 6],
            sampling=SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True),
            seed=0,
        )
        for index, name in enumerate(("first", "second"))
    )
    expected, _ = run(tiny_model, [[second]], **build, enable_prefix_caching=False)
    tokens, stats = run(tiny_model, [[first], [second]], **build)
    assert tokens["second"] == expected["second"]
    assert stats.num_cached_tokens == 992  # whole blocks of 32
    assert stats.num_prompt_tokens == 1002 + 1002 - 992


def test_prompts_that_part_within_a_block_share_its_beginning(tiny_model: PackedModel, build: dict[str, str]) -> None:
    first = [3 + index % 300 for index in range(100)]
    requests = [
        Request(
            request_id=f"{num_same} the same",
            model=tiny_model.name,
            prompt_token_ids=[*first[:num_same], *range(300, 300 - length, -1)],
            sampling=SamplingParams(max_tokens=12, temperature=temperature, ignore_eos=True),
            seed=num_same,
        )
        for num_same, length, temperature in ((100, 0, 0.0), (50, 30, 0.0), (10, 60, 0.9), (31, 1, 0.0), (95, 90, 1.2))
    ]
    expected, _ = run(tiny_model, [[request] for request in requests], **build, enable_prefix_caching=False)
    tokens, stats = run(tiny_model, [requests[:1], requests[1:]], **build)
    assert_same(tokens, expected)
    assert stats.num_cached_tokens == (32 + 16) + 8 + 24 + (64 + 24)


@pytest.mark.parametrize(
    "config",
    [
        {"max_num_batched_tokens": 512},
        {"max_num_batched_tokens": 32, "max_num_seqs": 8, "enable_prefix_caching": False},
    ],
    ids=["together", "small chunks"],
)
def test_the_default_model(default_alone: Tokens, default_model: PackedModel, config: dict[str, object]) -> None:
    tokens, _ = run(default_model, [default_requests(default_model)], **config)
    assert_same(tokens, default_alone)


def test_the_default_model_preempted_on_two_threads(default_alone: Tokens, default_model: PackedModel) -> None:
    growing = default_requests(default_model)[::3]  # those with the long answers
    tokens, stats = run(default_model, [growing], max_num_batched_tokens=128, kv_cache_tokens=384, threads=2)
    assert_same(tokens, {request.request_id: default_alone[request.request_id] for request in growing})
    assert stats.num_preemptions > 0


def default_requests(model: PackedModel) -> list[Request]:
    return make_requests(model, longest=160, max_tokens=(56, 10))


@pytest.fixture(scope="module")
def default_alone(default_model: PackedModel) -> Tokens:
    return run(default_model, [[request] for request in default_requests(default_model)], enable_prefix_caching=False)[
        0
    ]
