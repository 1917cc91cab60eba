from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.config import EngineConfig, gives_huge_pages
from engine.core import EngineCore
from engine.errors import ConfigError, ContextLengthError, RequestError, StalledRankError
from engine.kernels.layout import PackedTensor
from engine.models.spec import ModelInfo
from engine.ranks import Ranks
from engine.request import FinishReason, SamplingParams, StructuredOutputs, TokenDelta
from engine.resident import resident_weights
from engine.weights.pack import Source
from tests.engine.fakes import EOS, MAX_LEN, VOCAB, FakeProgram, expected_output, make_request, make_spec


@dataclass
class FakeModel:
    """The part of a PackedModel that the core reads."""

    name: str = "fake"
    source: Source = field(default_factory=lambda: Source("fake.gguf", "the checkpoint's digest", ""))
    info: ModelInfo = field(
        default_factory=lambda: ModelInfo(
            spec=make_spec(),
            tokenizer_json="",
            chat_template=None,
            bos_token_id=None,
            eos_token_ids=EOS,
            add_bos=False,
        )
    )
    weights: Mapping[str, Any] = field(default_factory=dict)

    def give_back(self) -> None:
        """Of a machine with several NUMA nodes."""


class Created:
    """Stands in for create_program and remembers how it was called."""

    def __call__(self, spec: Any, weights: Any, **how: Any) -> FakeProgram:
        self.how = how
        self.program = FakeProgram(num_blocks=how["num_blocks"], spec=spec)
        return self.program


def make_core(*, clock: Any = lambda: 0.0, **config: Any) -> tuple[EngineCore, FakeProgram]:
    created = Created()
    fields = {"kv_cache_tokens": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 64, "threads": 1} | config
    model: Any = FakeModel()
    return EngineCore(EngineConfig(**fields), model, create=created, clock=clock), created.program


def drain(core: EngineCore) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    while core.has_work:
        deltas += core.step()
        core.check_integrity()
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)
    return deltas


def tokens_of(deltas: list[TokenDelta], request_id: str) -> list[int]:
    return [token for delta in deltas if delta.request_id == request_id for token in delta.token_ids]


def test_requests_run_to_their_ends() -> None:
    core, _ = make_core()
    requests = [make_request(f"r{n}", [5] * n, seed=n) for n in (1, 20, 32, 50, 90)]
    for request in requests:
        core.add(request)
    deltas = drain(core)
    for request in requests:
        assert tokens_of(deltas, request.request_id) == expected_output(request)
    stats = core.stats()
    assert stats.num_requests_finished == 5
    assert stats.num_output_tokens == sum(len(delta.token_ids) for delta in deltas)
    assert stats.num_prompt_tokens + stats.num_cached_tokens == sum(len(r.prompt_token_ids) for r in requests)
    assert stats.num_steps > 0


def test_the_program_is_told_what_the_configuration_says() -> None:
    created, model = Created(), FakeModel()
    fake: Any = model
    config = EngineConfig(
        kv_cache_tokens=100, kv_cache_dtype="int8", isa="portable", threads=3, tensor_parallel_size=1, stall_timeout=4
    )
    EngineCore(config, fake, create=created, exit_status=9)
    ranks = Ranks(threads=(3,), cpus=((),), stall_timeout=4, exit_status=9)
    assert created.how == {"num_blocks": 4, "ranks": ranks, "isa": "portable", "kv_dtype": "int8"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, MAX_LEN),
        ({"kv_cache_tokens": 96}, 96),
        ({"kv_cache_tokens": 70}, 96),  # whole blocks
        ({"max_model_len": 100}, 100),
        ({"max_model_len": MAX_LEN}, MAX_LEN),
    ],
)
def test_max_model_len_is_what_model_memory_and_operator_allow(config: dict[str, int], expected: int) -> None:
    core, _ = make_core(**config)
    assert core.max_model_len == expected
    capabilities = core.capabilities()
    assert (capabilities.max_model_len, capabilities.vocab_size, capabilities.model) == (expected, VOCAB, "fake")
    assert capabilities.checkpoint_sha256 == "the checkpoint's digest"


def test_an_explicit_max_model_len_beyond_either_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len must be at most 256, the model's context, got 257"):
        make_core(max_model_len=257)
    with pytest.raises(
        ConfigError, match=r"must be at most 96, the tokens of KV memory \(kv_cache_tokens, kv_cache_memory\), got 97"
    ):
        make_core(max_model_len=97, kv_cache_tokens=96)


BASE = make_request("a", [1, 2, 3])
FORM = StructuredOutputs(regex="a")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": "other"}, "model", "model must be 'fake', got 'other'"),
        ({"adapter": "lora"}, "adapter", "adapter is not supported by this engine, got 'lora'"),
        ({"sampling": SamplingParams(logprobs=21)}, "logprobs", "logprobs must be between 0 and 20, got 21"),
        ({"sampling": SamplingParams(prompt_logprobs=-1)}, "prompt_logprobs", "between 0 and 20, got -1"),
        ({"grammar": "x", "sampling": SamplingParams(ignore_eos=True)}, "ignore_eos", "its end could not be told"),
        ({"sampling": SamplingParams(structured_outputs=FORM)}, "grammar", "must be compiled"),
        ({"pooling": "mean"}, "pooling", "pooling is not supported"),
        ({"prompt_token_ids": []}, "prompt", "at least one token"),
        ({"prompt_token_ids": [1, VOCAB]}, "prompt", f"must be in \\[0, {VOCAB}\\), got {VOCAB}"),
        ({"prompt_token_ids": [1, -1]}, "prompt", "got -1"),
        ({"output_token_ids": [VOCAB]}, "output_token_ids", f"got {VOCAB}"),
        ({"seed": -1}, "seed", "seed must be in"),
        ({"seed": 2**64}, "seed", "seed must be in"),
        ({"choice_index": -1}, "choice_index", "choice_index must be in"),
        ({"deadline": math.nan}, "deadline", "finite Unix time, got nan"),
        ({"sampling": SamplingParams(temperature=-1)}, "temperature", "between 0 and 2, got -1"),
        ({"sampling": SamplingParams(stop_token_ids=(99,))}, "stop_token_ids", "got 99"),
        ({"sampling": SamplingParams(logit_bias={99: 1.0})}, "logit_bias", "got 99"),
        ({"sampling": SamplingParams(logit_bias={3: math.nan})}, "logit_bias", "got nan"),
        ({"sampling": SamplingParams(bad_words=((3, 99),))}, "bad_words", "got 99"),
        ({"sampling": SamplingParams(bad_words=((),))}, "bad_words", "1 to 1024 tokens each, got 0"),
        ({"sampling": SamplingParams(bad_words=((3,),) * 513)}, "bad_words", "at most 512"),
        ({"sampling": SamplingParams(bad_words=tuple((i,) for i in range(VOCAB)))}, "bad_words", "leave no token"),
        ({"sampling": SamplingParams(allowed_token_ids=(99,))}, "allowed_token_ids", "got 99"),
        ({"sampling": SamplingParams(allowed_token_ids=())}, "allowed_token_ids", "got 0"),
        ({"sampling": SamplingParams(allowed_token_ids=EOS, min_tokens=1)}, "allowed_token_ids", "leave no token"),
    ],
)
def test_what_has_no_meaning_is_refused_and_leaves_nothing(change: dict[str, Any], param: str, message: str) -> None:
    core, _ = make_core()
    with pytest.raises(RequestError, match=message) as caught:
        core.add(msgspec.structs.replace(BASE, **change))
    assert caught.value.param == param
    assert not core.has_work


def test_a_prompt_as_long_as_the_context_is_refused() -> None:
    core, _ = make_core(max_model_len=64)
    with pytest.raises(ContextLengthError) as caught:
        core.add(make_request("a", [1] * 64))
    assert (caught.value.max_model_len, caught.value.num_tokens) == (64, 64)
    assert not core.has_work


def test_a_failed_step_fails_its_requests_and_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    core, program = make_core(max_num_seqs=2)
    requests = [make_request(f"r{n}", [n, 1, 2]) for n in range(4)]
    for request in requests:
        core.add(request)
    program.fail_with = RuntimeError("the kernel broke")
    with caplog.at_level(logging.ERROR, "seraph.engine"):
        deltas = core.step()
    core.check_integrity()
    assert [(d.request_id, d.finish_reason, d.error) for d in deltas] == [
        (name, FinishReason.ERROR, "RuntimeError: the kernel broke") for name in ("r0", "r1")
    ]
    assert "failed" in caplog.text
    deltas = drain(core)
    for request in requests[2:]:
        assert tokens_of(deltas, request.request_id) == expected_output(request)
    assert tokens_of(deltas, "r0") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StalledRankError("thread 0 of rank 1")], ids=repr)
def test_an_interrupted_step_is_computed_again(error: BaseException) -> None:
    """As for a stalled thread: it is our driver who ends then, not the request."""
    core, program = make_core()
    request = make_request("a", [1] * 40)
    core.add(request)
    program.fail_with = error
    with pytest.raises(type(error)):
        core.step()
    core.check_integrity()
    assert tokens_of(drain(core), "a") == expected_output(request)


def test_a_replay_continues_as_if_nothing_had_happened() -> None:
    sampling = SamplingParams(
        max_tokens=60,
        min_tokens=20,
        repetition_penalty=1.2,
        logit_bias={4: 1.0},
        allowed_token_ids=(0, *range(4, 9)),
        bad_words=((4, 4), (5, 6), (7, 8, 4)),
    )
    request = make_request("a", range(33), sampling=sampling, seed=9)
    whole = expected_output(request)
    for done in (1, 2, 3, 4, 19, 20, len(whole) - 1, len(whole)):
        core, _ = make_core()
        core.add(msgspec.structs.replace(request, output_token_ids=whole[:done]))
        deltas = drain(core)
        assert tokens_of(deltas, "a") == whole[done:]
        assert deltas[0].position == done
        assert deltas[-1].finish_reason is not None


def test_deadline_uses_the_clock_it_is_given() -> None:
    now = [1000.0]
    core, _ = make_core(clock=lambda: now[0])
    core.add(make_request("a", [1], sampling=SamplingParams(ignore_eos=True), deadline=1001.0))
    core.step()
    now[0] = 1001.0
    (delta,) = core.step()
    assert (delta.finish_reason, delta.position) == (FinishReason.DEADLINE, 1)
    assert not core.has_work


def test_abort_is_silent_and_final() -> None:
    core, _ = make_core()
    core.add(make_request("a", [1], sampling=SamplingParams(ignore_eos=True)))
    core.step()
    core.abort("a")
    core.abort("a")
    core.abort("never was")
    assert drain(core) == []


def test_prefix_cache_reports_what_it_saved() -> None:
    core, program = make_core()
    prefix = [3] * 200
    core.add(make_request("a", [*prefix, 1], sampling=SamplingParams(max_tokens=1)))
    drain(core)
    before = program.num_computed
    core.add(make_request("b", [*prefix, 2], sampling=SamplingParams(max_tokens=1)))
    (delta,) = drain(core)
    assert delta.num_cached_tokens == 192
    assert program.num_computed - before == 201 - 192
    assert core.stats().num_cached_tokens == 192


def test_composition_is_logged_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    core, _ = make_core()
    core.add(make_request("one", [1, 2, 3]))
    core.step()
    assert caplog.text == ""
    with caplog.at_level(logging.DEBUG, "seraph.engine"):
        core.step()
    assert "1 tokens of 1 requests: one[3:4]*; 1 running, 0 waiting; 31 of 32 blocks free" in caplog.text


def test_close_closes_the_program() -> None:
    core, program = make_core()
    core.close()
    core.close()
    assert program.closed


@dataclass
class Weighty:
    """A model of so many bytes, of which a copy is asked for or not."""

    nbytes: int

    @property
    def weights(self) -> dict[str, PackedTensor]:
        return {"embed": PackedTensor(None, np.empty(self.nbytes, np.uint8))}

    def copied(self) -> dict[str, PackedTensor]:
        return {}


@pytest.mark.parametrize(
    ("huge_pages", "nbytes", "copied"),
    [
        ("auto", 4 << 20, True),
        ("auto", (4 << 20) + 1, False),  # over an eighth
        ("auto", (2 << 20) - 1, False),  # no whole page
        ("on", 1000, True),
        ("off", 4 << 20, False),
    ],
)
def test_weights_are_copied_where_there_is_room(
    huge_pages: str, nbytes: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = Weighty(nbytes)
    monkeypatch.setattr("engine.resident.gives_huge_pages", lambda: True)
    assert (not resident_weights(huge_pages, model, 32 << 20)) is copied
    monkeypatch.setattr("engine.resident.gives_huge_pages", lambda: False)
    assert (not resident_weights(huge_pages, model, 32 << 20)) is (huge_pages == "on")


@pytest.mark.parametrize(
    ("said", "gives"),
    [("always [madvise] never\n", True), ("[always] madvise never\n", True), ("always madvise [never]\n", False)],
)
def test_what_the_system_says_of_huge_pages(tmp_path: Path, said: str, gives: bool) -> None:
    (tmp_path / "enabled").write_text(said)
    assert gives_huge_pages(tmp_path / "enabled") is gives
    assert not gives_huge_pages(tmp_path / "nothing")
