"""What the adapter does with vLLM's words, without vLLM: its command line, grammars, answers and log."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine.backends.vllm_journal import KEPT, Journal
from engine.backends.vllm_options import VllmOptions, reason_of
from engine.backends.vllm_request import as_lark, delta_of, seed_of
from engine.backends.vllm_stats import Counters
from engine.errors import ConfigError
from engine.request import FinishReason, Request, SamplingParams, StructuredOutputs, TokenLogprobs
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.tool_grammar import tool_grammar
from engine.text.tool_formats import FORMATS


def test_the_command_line() -> None:
    words = VllmOptions(
        folder=Path("/models/m"),
        model="m",
        max_model_len=2048,
        max_num_seqs=8,
        tensor_parallel_size=2,
        kv_cache_bytes=1 << 30,
        enable_prefix_caching=False,
        arguments=(("enforce_eager", "true"), ("--async-scheduling", "False"), ("dtype", "float32")),
    ).command_line()
    assert words[:2] == ["--model=/models/m", "--runner=generate"]
    for word in (
        "--max-model-len=2048",
        "--max-num-seqs=8",
        "--tensor-parallel-size=2",
        "--pipeline-parallel-size=1",
        "--kv-cache-memory-bytes=1073741824",
        "--no-enable-prefix-caching",
        "--scheduling-policy=priority",
        "--enforce-eager",
        "--no-async-scheduling",
        "--dtype=float32",
    ):
        assert word in words
    assert not any(word.startswith("--max-num-batched-tokens") for word in words), "as vLLM decides"


def test_a_pooling_model_is_told_nothing_of_answers() -> None:
    words = VllmOptions(folder=Path("/models/m"), model="m", pooling=True).command_line()
    assert "--runner=pooling" in words
    assert not any("structured" in word or "prefix" in word for word in words)


@pytest.mark.parametrize("key", ["model", "--max-model-len", "tensor_parallel_size", "scheduling-policy"])
def test_what_seraph_decides_on_is_no_argument_of_vllm(key: str) -> None:
    options = VllmOptions(folder=Path("m"), model="m", arguments=((key, "1"),))
    with pytest.raises(ConfigError, match="leave it out"):
        options.command_line()


def test_reasons_are_one_line() -> None:
    assert reason_of(ValueError("no\nsuch  thing\n\nUpgrade!")) == "no such thing"
    assert reason_of(ValueError()) == "ValueError"


# Requests


REQUEST = Request(request_id="r", model="m", prompt_token_ids=[5, 6, 7], sampling=SamplingParams(), seed=9)


def test_seeds_differ_by_choice_and_by_where_they_go_on() -> None:
    seeds = {
        seed_of(msgspec.structs.replace(REQUEST, seed=seed, choice_index=choice), position)
        for seed in (0, 2**64 - 1)
        for choice in (0, 1)
        for position in (0, 7)
    }
    assert len(seeds) == 8 and all(seed is not None and 0 <= seed < 2**63 for seed in seeds)
    assert seed_of(REQUEST, 3) == seed_of(REQUEST, 3)


def test_seeds_that_nobody_asked_for_are_not_passed_on() -> None:
    assert REQUEST.sampling.temperature > 0
    assert seed_of(msgspec.structs.replace(REQUEST, any_seed=True), 0) is None
    greedy = msgspec.structs.replace(REQUEST, sampling=SamplingParams(temperature=0.0))
    assert seed_of(greedy, 0) is None


SCHEMA = {"type": "object", "properties": {"a": {"const": "@t0 start: ::="}}, "required": ["a"]}


@pytest.mark.parametrize(
    "form",
    [
        StructuredOutputs(json=SCHEMA),
        StructuredOutputs(json_object=True),
        StructuredOutputs(regex="[ab]+"),
        StructuredOutputs(choice=("x", "y::=z")),
        StructuredOutputs(grammar='root ::= "a" | "b" root'),
    ],
    ids=lambda form: "".join(name for name in ("json", "json_object", "regex", "choice") if getattr(form, name)),
)
def test_every_form_is_a_lark_grammar(form: StructuredOutputs) -> None:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    with GrammarCompiler() as compiler:
        text = as_lark(compiler.compile(form))
    assert any_to_lark(text) == text, "vLLM would take it for another language"
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(text))


@pytest.mark.parametrize("name", FORMATS)
def test_grammars_of_calls_are_lark_grammars(name: str) -> None:
    from llguidance import LLMatcher

    schemas: dict[str, dict[str, Any]] = {
        f"tool{i}": {**SCHEMA, "properties": {"a": {"type": "integer"}, f"b{i}": {"type": "string", "maxLength": 5}}}
        for i in range(12)
    }
    text = as_lark(tool_grammar(FORMATS[name], schemas, calls="auto", thinks="may"))
    assert "@" not in text.replace(json.dumps(SCHEMA), "")
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(text))


# Answers


def logprob(value: float, rank: int) -> Any:
    return SimpleNamespace(logprob=value, rank=rank)


def output(token_ids: list[int], reason: str | None = None, logprobs: Any = None, **fields: Any) -> Any:
    choice = SimpleNamespace(token_ids=token_ids, finish_reason=reason, logprobs=logprobs)
    return SimpleNamespace(outputs=[choice], num_cached_tokens=None, prompt_logprobs=None, **fields)


def sampled(**fields: Any) -> Request:
    return msgspec.structs.replace(REQUEST, sampling=SamplingParams(**fields))


def test_deltas() -> None:
    delta = delta_of(REQUEST, output([1, 2]), 3)
    assert (delta.position, delta.token_ids, delta.finish_reason, delta.stop_token_id) == (3, [1, 2], None, None)
    last = delta_of(REQUEST, output([4], "stop"), 5)
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, 4)
    assert delta_of(REQUEST, output([4], "length"), 5).finish_reason is FinishReason.LENGTH
    failed = delta_of(REQUEST, output([], "error"), 5)
    assert failed.finish_reason is FinishReason.ERROR and "error" in (failed.error or "")


def test_logprobs() -> None:
    found = [{7: logprob(-3.0, 9), 1: logprob(-0.5, 1), 2: logprob(-1.0, 2)}]
    (told,) = delta_of(sampled(logprobs=2), output([7], logprobs=found), 0).logprobs
    assert told == TokenLogprobs(7, -3.0, 9, [(1, -0.5), (2, -1.0)])
    tied = [{7: logprob(-1.0, 2), 1: logprob(-0.5, 1), 2: logprob(-1.0, 2)}]
    (told,) = delta_of(sampled(logprobs=2), output([7], logprobs=tied), 0).logprobs
    assert len(told.top) == 2 and told.top[0] == (1, -0.5)
    (bare,) = delta_of(sampled(logprobs=0), output([7], logprobs=found), 0).logprobs
    assert bare == TokenLogprobs(7, -3.0, 9, [])


def test_prompt_logprobs() -> None:
    said = output([1])
    said.prompt_logprobs = [None, {6: logprob(-1.0, 1)}, {7: logprob(-2.0, 4), 3: logprob(-0.1, 1)}]
    told = delta_of(sampled(prompt_logprobs=1), said, 0).prompt_logprobs
    assert told == [TokenLogprobs(6, -1.0, 1, [(6, -1.0)]), TokenLogprobs(7, -2.0, 4, [(3, -0.1)])]


def test_who_asks_for_no_token_gets_none() -> None:
    delta = delta_of(sampled(max_tokens=0), output([1], "stop"), 0)
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ([], FinishReason.LENGTH, None)


def test_counters() -> None:
    counters = Counters()
    scheduler = SimpleNamespace(
        num_running_reqs=2,
        num_waiting_reqs=1,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=0.25,
        spec_decoding_stats=SimpleNamespace(num_draft_tokens=4, num_accepted_tokens=3),
    )
    iteration = SimpleNamespace(
        prompt_token_stats=SimpleNamespace(computed=10, cached_tokens=6),
        num_generation_tokens=2,
        num_preempted_reqs=1,
        finished_requests=[object()],
    )
    for _ in range(2):
        counters.record(scheduler, iteration)
    counters.record(None, None)
    stats = counters.snapshot(num_blocks=8, num_restarts=1)
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks, stats.num_blocks) == (2, 2, 6, 8)
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.num_output_tokens) == (20, 12, 4)
    assert (stats.num_draft_tokens, stats.num_accepted_tokens, stats.num_preemptions) == (8, 6, 2)
    assert (stats.num_requests_finished, stats.num_steps, stats.num_restarts) == (2, 2, 1)


# The log


def test_the_log_tells_stages_once(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "org/m")
    journal.path.write_text("INFO Starting to load model /m\nINFO Loading weights to")
    assert journal.news() == ["loading the weights"]
    with journal.path.open("a") as file:
        file.write("ok 1 s\nINFO Loading weights took 3 s\nINFO Starting to load model again\n")
    assert journal.news() == ["the weights are loaded"]
    assert journal.news() == []


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", ""),
        (
            "Traceback\nValueError: too large\nRuntimeError: Engine core initialization failed. See\n",
            "ValueError: too large",
        ),
        ("RuntimeError: Engine core initialization failed\n", ""),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", "OutOfMemoryError: CUDA out of memory."),
        ("INFO ValueError: in the middle of a line\nKeyError\n", "KeyError"),
    ],
)
def test_the_log_tells_the_cause(tmp_path: Path, text: str, cause: str) -> None:
    journal = Journal(tmp_path, "m")
    journal.path.write_text(text)
    assert journal.cause() == cause


def test_old_logs_go(tmp_path: Path) -> None:
    for _ in range(KEPT + 5):
        last = Journal(tmp_path, "m")
    assert len(list(tmp_path.glob("*.log"))) <= KEPT + 1 and last.path.exists()
    assert len(list(tmp_path.glob("*.json"))) <= KEPT + 1
    last.remove()
    assert not last.path.exists() and not last.config_path.exists()
