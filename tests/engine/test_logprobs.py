"""Log-probabilities through the engine: the same bits in any company, and those of an independent implementation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.perplexity import windows_nll
from engine.config import EngineConfig, available_cpus
from engine.core import EngineCore
from engine.kernels import available_isas, create_program
from engine.kernels.reference import ReferenceProgram
from engine.kernels.selftest import UNFUSED
from engine.llm import LLM
from engine.request import EngineStats, FinishReason, Request, SamplingParams, TokenLogprobs
from engine.weights import PackedModel, load_model
from tests.engine.test_invariance import COMPANY, make_requests
from tests.golden.checkpoints import write_checkpoint
from tests.tiny_gguf import write_tiny_llama

GOLDEN = Path(__file__).parents[1] / "golden"

COMPANIES = ("chunks of 32", "preempted", "two threads, preempted")
"""Of those that the invariance of tokens is tested in."""

Scores = dict[str, tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]]
"""Of each request its tokens, their log-probabilities, and those of its prompt."""


def run(model: PackedModel, batches: Iterable[list[Request]], **config: object) -> tuple[Scores, EngineStats]:
    """The requests of one batch run together, batches one after another."""
    fields = {"threads": 1, "max_num_seqs": 32, "kv_cache_tokens": 32 * 600} | config
    core = EngineCore(msgspec.convert(fields, EngineConfig), model)
    scores: Scores = {}
    try:
        for batch in batches:
            for request in batch:
                scores[request.request_id] = ([], [], [])
                core.add(request)
            while core.has_work:
                for delta in core.step():
                    assert delta.error is None
                    for all_of_them, new in zip(
                        scores[delta.request_id], (delta.token_ids, delta.logprobs, delta.prompt_logprobs), strict=True
                    ):
                        all_of_them += new  # type: ignore[operator]
        core.check_integrity()
        return scores, core.stats()
    finally:
        core.close()


def scored(request: Request, **changes: object) -> Request:
    sampling = msgspec.structs.replace(request.sampling, logprobs=5, prompt_logprobs=3)
    return msgspec.structs.replace(request, sampling=sampling, **changes)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    home = tmp_path_factory.mktemp("home")
    write_tiny_llama(home / "tiny.gguf", hidden=96, layers=2, heads=6, kv_heads=2, ffn=160, context=1200, tie=False)
    return load_model(str(home / "tiny.gguf"), home=home)


@pytest.fixture(scope="module")
def requests(tiny_model: PackedModel) -> list[Request]:
    return [scored(request) for request in make_requests(tiny_model, longest=300, max_tokens=(96, 40))[::2]]


@pytest.fixture(scope="module", params=available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(tiny_model: PackedModel, requests: list[Request], isa: str) -> Scores:
    batches = [[request] for request in requests]
    scores, _ = run(tiny_model, batches, isa=isa, enable_prefix_caching=False, speculation="off")
    for request in requests:
        tokens, of_tokens, of_prompt = scores[request.request_id]
        assert [each.token_id for each in of_tokens] == tokens
        assert [each.token_id for each in of_prompt] == request.prompt_token_ids[1:]
        assert all(len(each.top) == 5 for each in of_tokens) and all(len(each.top) == 3 for each in of_prompt)
    return scores


def assert_same(scores: Scores, expected: Scores) -> None:
    different = [name for name in expected if scores[name] != expected[name]]
    assert not different, f"{len(different)} of {len(expected)} requests got other bits than alone: {different}"


@pytest.mark.parametrize("company", COMPANIES)
def test_logprobs_do_not_depend_on_company(
    tiny_model: PackedModel, requests: list[Request], isa: str, alone: Scores, company: str
) -> None:
    scores, stats = run(tiny_model, [requests], isa=isa, **COMPANY[company])
    assert_same(scores, alone)
    assert (stats.num_preemptions > 0) == ("kv_cache_tokens" in COMPANY[company])


def test_logprobs_of_cached_prompts_are_computed_all_the_same(
    tiny_model: PackedModel, requests: list[Request], isa: str, alone: Scores
) -> None:
    """Beside others that do not ask, which take from the cache all they can."""
    plain = [
        msgspec.structs.replace(
            request,
            request_id=f"{request.request_id} plain",
            sampling=msgspec.structs.replace(request.sampling, logprobs=None, prompt_logprobs=None),
        )
        for request in requests
    ]
    again = [scored(request, request_id=f"{request.request_id} again") for request in requests]
    scores, stats = run(tiny_model, [requests, [*plain[::2], *again]], isa=isa)
    assert_same(scores, alone | {f"{name} again": each for name, each in alone.items()})
    assert_same(scores, {request.request_id: (alone[request.request_id[:-6]][0], [], []) for request in plain[::2]})
    assert stats.num_cached_tokens > 0


def test_logprobs_do_not_depend_on_guesses(tiny_model: PackedModel, requests: list[Request], isa: str) -> None:
    telling = [
        msgspec.structs.replace(request, prompt_token_ids=request.prompt_token_ids * 3)
        for request in requests
        if len(request.prompt_token_ids) < 80
    ]
    batches = [telling[index : index + 3] for index in range(0, len(telling), 3)]
    expected, _ = run(tiny_model, batches, isa=isa, speculation="off")
    scores, stats = run(tiny_model, batches, isa=isa)
    assert_same(scores, expected)
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


def test_a_resumed_request_goes_on_with_its_logprobs(
    tiny_model: PackedModel, requests: list[Request], isa: str, alone: Scores
) -> None:
    done = {request.request_id: index % len(alone[request.request_id][0]) for index, request in enumerate(requests)}
    resumed = [
        msgspec.structs.replace(request, output_token_ids=alone[request.request_id][0][: done[request.request_id]])
        for request in requests
    ]
    scores, _ = run(tiny_model, [resumed], isa=isa, max_num_batched_tokens=64)
    for name, (tokens, of_tokens, of_prompt) in scores.items():
        whole = alone[name]
        assert (tokens, of_tokens) == (whole[0][done[name] :], whole[1][done[name] :])
        assert of_prompt == ([] if done[name] else whole[2])  # brought with the first token


def test_builds_agree(tiny_model: PackedModel, requests: list[Request]) -> None:
    """Where they fuse multiply-adds, in every bit."""
    isas = [isa for isa in available_isas() if isa not in UNFUSED]
    first, *others = (run(tiny_model, [requests], isa=isa)[0] for isa in isas)
    for other in others:
        assert_same(other, first)


def test_only_the_prompt(tiny_model: PackedModel, requests: list[Request], alone: Scores, isa: str) -> None:
    prompts = [
        msgspec.structs.replace(request, sampling=SamplingParams(max_tokens=0, prompt_logprobs=3))
        for request in requests
    ]
    scores, stats = run(tiny_model, [prompts], isa=isa)
    assert_same(scores, {name: ([], [], of_prompt) for name, (_, _, of_prompt) in alone.items()})
    assert stats.num_output_tokens == 0 and stats.num_requests_finished == len(prompts)


def test_offline(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny.gguf")
    with LLM(str(tmp_path / "tiny.gguf"), home=tmp_path, kv_cache_tokens=4096, threads=1, progress=False) as llm:
        sampling = SamplingParams(max_tokens=6, temperature=0.0, logprobs=2, prompt_logprobs=0, ignore_eos=True)
        (told,) = llm.generate([5, 6, 7], sampling, progress=False)
        (plain,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
        assert (plain.token_ids, plain.logprobs, plain.prompt_logprobs) == (told.token_ids, None, None)
        assert told.logprobs is not None and told.prompt_logprobs is not None
        assert [each.token_id for each in told.logprobs] == told.token_ids
        assert all(each.rank == 1 and each.top[0] == (each.token_id, each.logprob) for each in told.logprobs)
        first, *others = told.prompt_logprobs
        assert first is None and [each and each.token_id for each in others] == [6, 7]
        (none,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=0))
        assert (none.token_ids, none.finish_reason) == ([], FinishReason.LENGTH)


# Against transformers in float32; tests/golden says where the figures are from.

ERRORS = {
    "bf16_hidden_576_tied": (2e-2, 4e-3),  # keys and values of bfloat16
    "q8_0_gqa_tied": (0.15, 0.03),  # activations of 8 bits
    "q4_1_mha_untied": (0.15, 0.03),
}
"""Tiny checkpoints, and by how much the arithmetic of serving may move a log-probability: at most, and on average."""


def prompt_scores(model: PackedModel, token_ids: list[int], *, exact: bool = False) -> list[TokenLogprobs]:
    """Of the prompt's second token to its last, with the 20 best each, by the best build or in float32."""

    def in_float32(*_: object, num_blocks: int, **__: object) -> ReferenceProgram:
        return ReferenceProgram(
            model.info.spec, model.weights, num_blocks=num_blocks, activations="float32", kv_dtype="float32"
        )

    config = EngineConfig(max_num_seqs=1, kv_cache_tokens=1056)
    core = EngineCore(config, model, create=in_float32) if exact else EngineCore(config, model)
    try:
        core.add(
            Request(
                request_id="r",
                model=model.name,
                prompt_token_ids=token_ids,
                sampling=SamplingParams(max_tokens=0, prompt_logprobs=20),
                seed=0,
            )
        )
        scores: list[TokenLogprobs] = []
        while core.has_work:
            for delta in core.step():
                scores += delta.prompt_logprobs
        return scores
    finally:
        core.close()


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    logprobs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logprobs


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ERRORS)
def test_tiny_checkpoints_against_transformers(tmp_path: Path, name: str, exact: bool) -> None:
    model = load_model(str(write_checkpoint(tmp_path, name)), home=tmp_path)
    with np.load(GOLDEN / f"tiny_{name}.npz") as golden:
        token_ids, positions = golden["token_ids"].tolist(), golden["positions"]
        expected = log_softmax(golden["logits"])
    scores = prompt_scores(model, token_ids, exact=exact)
    errors = np.array(
        [
            logprob - expected[row, token]
            for row, position in enumerate(positions[positions + 1 < len(token_ids)])
            for each in [scores[position]]
            for token, logprob in [(each.token_id, each.logprob), *each.top]
        ]
    )
    assert len(errors) == 21 * 23
    most, mean = (1e-3, 1e-4) if exact else ERRORS[name]
    assert np.abs(errors).max() < most and np.abs(errors).mean() < mean


def test_the_default_model_against_transformers(default_model: PackedModel) -> None:
    """Of the 20 best at every position; float32 arithmetic is compared in kernels/test_golden.py."""
    with np.load(GOLDEN / "default_logits.npz") as golden:
        prompts = np.split(golden["token_ids"], np.cumsum(golden["prompt_lens"])[:-1])
        ids, expected = golden["top_ids"], golden["top_logits"] - golden["logsumexp"][:, None]
    errors: list[float] = []
    at = 0
    for prompt in prompts:
        for row, each in enumerate(prompt_scores(default_model, prompt.tolist()), at):
            known = dict(zip(ids[row].tolist(), expected[row].tolist(), strict=True))
            errors += [logprob - known[token] for token, logprob in each.top if token in known]
        at += len(prompt)
    assert len(errors) > 2600
    assert abs(np.mean(errors)) < 1e-2 and np.abs(errors).mean() < 0.15  # activations of 8 bits


def test_perplexity(default_model: PackedModel) -> None:
    """Of a window of the text: transformers' within 1e-2, and exactly what logits of the same build say."""
    with np.load(GOLDEN / "default_perplexity.npz") as golden:
        token_ids, nll = golden["token_ids"][: int(golden["window"])], float(golden["nll"][0])
    scores = prompt_scores(default_model, token_ids.tolist())
    told = -math.fsum(each.logprob for each in scores) / len(scores)
    assert told == pytest.approx(nll, abs=1e-2)
    spec = default_model.info.spec
    program = create_program(spec, default_model.weights, num_blocks=32, threads=available_cpus())
    try:
        ((total, count),) = windows_nll(program, spec, token_ids, len(token_ids))
    finally:
        program.close()
    assert told == pytest.approx(total / count, abs=1e-6)
