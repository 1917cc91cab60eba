from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

import engine
from engine.core import EngineCore
from engine.errors import ConfigError, ContextLengthError, EngineError, RequestError
from engine.kernels.batch import Int32, Program, StepBatch
from engine.llm import LLM, _Stream
from engine.llm_bars import REFRESH_SECONDS, GenerationBar, describe
from engine.request import FinishReason, Request, SamplingParams, TokenDelta
from tests.tiny_gguf import write_tiny_llama

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_tiny_llama(folder / "tiny.gguf")
    return folder


@pytest.fixture
def llm(home: Path) -> Iterator[LLM]:
    with LLM(str(home / "tiny.gguf"), home=home, kv_cache_tokens=4096, threads=1, progress=False) as made:
        yield made
        core = core_of(made)
        core.check_integrity()
        assert not core.has_work, "a request was left behind"


def core_of(llm: LLM) -> EngineCore:
    assert isinstance(llm._core, EngineCore)
    return llm._core


class Hooked:
    """A program that calls `before` ahead of each step."""

    def __init__(self, program: Program, before: Callable[[], None]) -> None:
        self._program = program
        self._before = before

    def step(self, batch: StepBatch) -> Int32:
        self._before()
        return self._program.step(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def hook(llm: LLM, before: Callable[[], None]) -> None:
    runner = core_of(llm)._runner
    runner.program = Hooked(runner.program, before)


def test_one_prompt_or_many_as_text_or_ids(llm: LLM) -> None:
    (one,) = llm.generate("The sea", GREEDY, progress=False)
    ids = llm.text.encode("The sea")
    (same,) = llm.generate(ids, GREEDY, progress=False)
    mixed: list[str | list[int]] = ["The sea", ids, "Another"]
    many = llm.generate(mixed, GREEDY, progress=False)
    assert one.token_ids == same.token_ids == many[0].token_ids == many[1].token_ids
    assert one.text == llm.text.decode(one.token_ids)
    assert (one.finish_reason, len(one.token_ids), one.num_prompt_tokens) == (FinishReason.LENGTH, 12, len(ids))
    assert many[2].token_ids != one.token_ids
    assert llm.generate([], GREEDY) == []


def test_seeds_and_sampling_per_prompt(llm: LLM) -> None:
    def tokens(seed: int, count: int = 2) -> list[list[int]]:
        return [c.token_ids for c in llm.generate(["a sea"] * count, SAMPLED, seed=seed, progress=False)]

    assert tokens(1) == tokens(1)
    assert tokens(1)[1] == tokens(2)[0], "prompt i is drawn with seed + i"
    assert tokens(1)[0] != tokens(1)[1]
    lengths = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5)]
    assert [len(c.token_ids) for c in llm.generate(["a", "b"], lengths, progress=False)] == [1, 5]


def test_bad_words_and_what_is_shown(llm: LLM) -> None:
    (free,) = llm.generate("The sea", GREEDY, progress=False)
    words = llm.text.bad_words([free.text[:2]])
    (other,) = llm.generate("The sea", msgspec.structs.replace(GREEDY, bad_words=words), progress=False)
    assert other.text[:2] != free.text[:2]
    only = SamplingParams(max_tokens=3, allowed_token_ids=(2,), skip_special_tokens=False)
    ends = [only, msgspec.structs.replace(only, include_stop_str_in_output=True)]
    ends.append(msgspec.structs.replace(only, ignore_eos=True))
    assert [c.text for c in llm.generate(["a"] * 3, ends, progress=False)] == ["", "<|im_end|>", "<|im_end|>" * 3]


def test_chat_uses_the_models_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    (chatted,) = llm.chat(conversation, GREEDY, progress=False)
    prompt = llm.text.encode_chat(conversation)
    assert chatted.token_ids == llm.generate(prompt, GREEDY, progress=False)[0].token_ids
    assert chatted.num_prompt_tokens == len(prompt)
    two = llm.chat([conversation, [{"role": "user", "content": "Bye"}]], GREEDY, progress=False)
    assert two[0].token_ids == chatted.token_ids
    assert two[1].token_ids != chatted.token_ids


def test_what_is_streamed_is_what_is_returned(llm: LLM) -> None:
    for prompt in ("The sea", [{"role": "user", "content": "Hello"}]):
        pieces = list(llm.stream(prompt, SAMPLED, seed=5))
        whole = llm.generate(prompt, SAMPLED, seed=5, progress=False) if isinstance(prompt, str) else None
        whole = whole or llm.chat(prompt, SAMPLED, seed=5, progress=False)  # type: ignore[arg-type]
        assert "".join(pieces) == whole[0].text
        assert all(pieces)


def test_cached_tokens_are_reported(llm: LLM) -> None:
    prompt = [5 + index % 200 for index in range(100)]
    first, second = (llm.generate(prompt, GREEDY, progress=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 96)
    assert first.token_ids == second.token_ids


def test_a_stop_string_ends_the_text_and_the_request(llm: LLM) -> None:
    long = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (whole,) = llm.generate("The sea", long, progress=False)
    stop = whole.text[5:8]
    (cut,) = llm.generate(
        "The sea", SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(stop,)), progress=False
    )
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 40
    assert not core_of(llm).has_work


def test_a_stop_token_is_counted_but_not_shown(llm: LLM) -> None:
    (whole,) = llm.generate("The sea", GREEDY, progress=False)
    stop = whole.token_ids[4]
    end = whole.token_ids.index(stop) + 1
    (cut,) = llm.generate(
        "The sea", SamplingParams(temperature=0.0, ignore_eos=True, stop_token_ids=(stop,)), progress=False
    )
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[:end], FinishReason.STOP)
    assert cut.text == llm.text.decode(whole.token_ids[: end - 1])


def test_streams_take_turns_and_may_be_left(llm: LLM) -> None:
    expected = ["".join(llm.stream(prompt, SAMPLED, seed=3)) for prompt in ("one", "two")]
    first, second, third = (llm.stream(prompt, SAMPLED, seed=3) for prompt in ("one", "two", "three"))
    texts = ["", ""]
    texts[0] += next(first)
    next(third)
    texts[1] += next(second)
    llm.generate("between", GREEDY, progress=False)  # its steps advance the streams too
    third.close()
    texts[0] += "".join(first)
    texts[1] += "".join(second)
    assert texts == expected


def test_a_stream_that_was_never_read_leaves_nothing(llm: LLM) -> None:
    stream = llm.stream("one", SAMPLED)
    assert not core_of(llm).has_work
    stream.close()
    begun = llm.stream("one", SAMPLED)
    next(begun)
    assert core_of(llm).has_work
    del begun
    assert not core_of(llm).has_work


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "message"),
    [
        (["fine", []], GREEDY, RequestError, "at least one token, got none"),
        (["fine", [10**6]], GREEDY, RequestError, "token ids must be in"),
        (["fine", ["a"]], GREEDY, RequestError, "prompt 1 must be a string or a list of token ids"),
        (["fine", [5] * 512], GREEDY, ContextLengthError, "maximum context length is 512 tokens"),
        (["fine", "too"], [GREEDY], RequestError, "one for each of 2 prompts, got 1"),
        ("fine", SamplingParams(stop=("",)), RequestError, "stop strings must not be empty"),
        ("fine", SamplingParams(temperature=3), RequestError, "temperature must be between 0 and 2, got 3"),
    ],
)
def test_bad_input_starts_nothing(llm: LLM, prompts: Any, sampling: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompts, sampling, progress=False)
    assert not core_of(llm).has_work


def test_a_failed_kernel_is_an_engine_error(llm: LLM) -> None:
    def fail() -> None:
        raise RuntimeError("the kernel broke")

    program = core_of(llm)._runner.program
    hook(llm, fail)
    with pytest.raises(EngineError, match="the kernel broke"):
        llm.generate(["a", "b"], GREEDY, progress=False)
    with pytest.raises(EngineError, match="the kernel broke"):
        list(llm.stream("a", GREEDY))
    core_of(llm)._runner.program = program
    assert len(llm.generate("a", GREEDY, progress=False)[0].token_ids) == 12


def test_ctrl_c_leaves_nothing_running_and_the_llm_usable(llm: LLM) -> None:
    (expected,) = llm.generate("The sea", GREEDY, progress=False)
    steps = 0

    def interrupt() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    hook(llm, interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], GREEDY, progress=False)
    assert not core_of(llm).has_work
    assert steps == 3, "it stops after the step under way"
    steps = 0
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream("a", GREEDY))
    assert not core_of(llm).has_work
    assert llm.generate("The sea", GREEDY, progress=False)[0].token_ids == expected.token_ids
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_closed_it_says_so(home: Path) -> None:
    llm = LLM(str(home / "tiny.gguf"), home=home, kv_cache_tokens=512, progress=False)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a", GREEDY, progress=False)


def test_the_bar_shows_requests_and_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    stream = llm.stream("not of this batch", GREEDY)
    next(stream)
    llm.generate(["a", "b"], GREEDY)
    stream.close()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"2/2, 24 tokens, [\d,]+ tokens/s, 0:00:0\d", shown.err)


def test_the_bar_counts_what_may_still_come(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    prompt = [5] * 12
    asked = [SamplingParams(max_tokens=10), SamplingParams()]
    streams = [_Stream(request(prompt, params), llm.text.stream()) for params in asked]
    num_threads = threading.active_count()
    with GenerationBar(streams, 512, clock=lambda: now[0]) as bar:
        assert threading.active_count() == num_threads, "nothing may outlive an interrupted batch"
        for _ in range(4):
            streams[0].receive(TokenDelta(request_id="a", position=0, token_ids=[5]))
        now[0] += 2.0
        bar.update(last=True)  # 4 tokens in 2 s; 6 and 500 may come
        streams[1].receive(TokenDelta(request_id="b", position=0, finish_reason=FinishReason.STOP))
        now[0] += REFRESH_SECONDS / 2
        bar.update(last=False)  # too soon
        now[0] += REFRESH_SECONDS
        assert bar._count() == (1, 4, 10)  # the other one ended without a token
    assert "0/2, 4 tokens, 2 tokens/s, 0:04:13 to go" in capsys.readouterr().err
    assert describe(0, 2, 0, 20, 0.0) == "0/2, 0 tokens, 0 tokens/s"


def request(prompt: list[int], params: SamplingParams) -> Request:
    return Request(request_id="r", model="m", prompt_token_ids=prompt, sampling=params, seed=0)


def test_it_may_be_used_from_several_threads(llm: LLM) -> None:
    prompts = [f"prompt {index}" for index in range(8)]
    expected = [llm.generate(prompt, SAMPLED, seed=9, progress=False)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        whole = list(pool.map(lambda prompt: llm.generate(prompt, SAMPLED, seed=9, progress=False)[0], prompts))
        streamed = list(pool.map(lambda prompt: "".join(llm.stream(prompt, SAMPLED, seed=9)), prompts))
    assert [one.token_ids for one in whole] == expected
    assert streamed == [one.text for one in whole]


def test_closing_ends_what_other_threads_wait_for(home: Path) -> None:
    llm = LLM(str(home / "tiny.gguf"), home=home, kv_cache_tokens=4096, threads=1, progress=False)
    endless = SamplingParams(ignore_eos=True)
    begun = threading.Event()
    hook(llm, begun.set)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(llm.generate, ["a"] * 64, endless, progress=False)
        assert begun.wait(10)
        llm.close()
        with pytest.raises(EngineError, match="closed"):
            call.result(10)
    assert not llm._live


def test_a_stream_that_is_collected_in_the_middle_of_a_step_is_aborted_after_it(llm: LLM) -> None:
    class Owner:
        def __init__(self, stream: Any) -> None:
            self.me, self.stream = self, stream  # a cycle: only the collector frees it

    def collect() -> None:
        gc.collect()

    (expected,) = llm.generate("The sea", GREEDY, progress=False)
    owner = Owner(llm.stream("one", SamplingParams(ignore_eos=True)))
    next(owner.stream)
    del owner
    hook(llm, collect)
    (same,) = llm.generate("The sea", GREEDY, progress=False)
    assert same.token_ids == expected.token_ids
    assert not core_of(llm).has_work


def test_configuration_is_checked_before_anything_is_loaded(home: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs must be between 1 and 1024, got 0"):
        LLM("nothing like this exists", home=home, max_num_seqs=0)


def test_public_names() -> None:
    assert engine.LLM is LLM
    assert engine.SamplingParams is SamplingParams
    assert set(engine.__all__) <= set(dir(engine))
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = engine.nothing


def test_errors_are_cheap_to_import() -> None:
    script = "import sys, engine.errors; assert not {'numpy', 'engine.llm', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
