from __future__ import annotations

import copy

import pytest

from engine.kernels.batch import Int32, StepBatch
from engine.request import Request, SamplingParams
from engine.scheduler.scheduler import Scheduler
from engine.worker.runner import Runner
from tests.engine.fakes import EOS, MAX_LEN, FakeProgram, expected_output, make_request


class Recorder(FakeProgram):
    """Keeps a copy of every batch it is given."""

    def __init__(self) -> None:
        super().__init__(num_blocks=64)
        self.seen: list[StepBatch] = []

    def step(self, batch: StepBatch) -> Int32:
        chosen = super().step(batch)
        self.seen.append(copy.deepcopy(batch))
        return chosen


class Bench:
    """A scheduler and a runner over one program."""

    def __init__(self, program: FakeProgram, *, max_num_seqs: int = 8, budget: int = 64, caching: bool = True) -> None:
        self.scheduler = Scheduler(
            num_blocks=program.num_blocks,
            max_model_len=MAX_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
            eos_token_ids=EOS,
        )
        self.runner = Runner(
            program,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_LEN,
            vocab_size=program.spec.vocab_size,
        )
        self.output: dict[str, list[int]] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.output[request.request_id] = list(request.output_token_ids)
            self.scheduler.add(request)

    def step(self) -> None:
        plan = self.scheduler.schedule()
        for delta in self.scheduler.update(plan, self.runner.run(plan)):
            self.output[delta.request_id] += delta.token_ids

    def finish(self) -> dict[str, list[int]]:
        while self.scheduler.has_work:
            self.step()
        return self.output


def test_arrays_of_a_mixed_step() -> None:
    program = Recorder()
    bench = Bench(program, budget=40)
    bench.add(make_request("a", [5, 6, 7], sampling=SamplingParams(max_tokens=9, ignore_eos=True)))
    bench.step()
    bench.add(make_request("b", list(range(10, 60)), sampling=SamplingParams(temperature=0.5), seed=2**64 - 1))
    bench.step()
    batch = program.seen[1]
    assert batch.token_ids.tolist() == [bench.output["a"][0], *range(10, 49)]
    assert batch.positions.tolist() == [3, *range(39)]
    assert batch.query_starts.tolist() == [0, 1, 40]
    assert batch.seq_lens.tolist() == [4, 39]
    assert batch.logits_rows.tolist() == [0]
    assert batch.block_tables.shape == (1, 2, MAX_LEN // 32)
    first, second = batch.block_tables[0]
    assert len({int(first[0]), int(second[0]), int(second[1])}) == 3
    bench.step()
    sampling = program.seen[2].sampling
    assert sampling is not None
    assert sampling.temperature.tolist() == [1.0, 0.5]
    assert sampling.seed.tolist() == [0, 2**64 - 1]
    assert sampling.position.tolist() == [5, 50]


def test_a_step_without_tokens_to_choose_has_no_sampling() -> None:
    program = Recorder()
    bench = Bench(program, budget=32)
    bench.add(make_request("a", list(range(40))))
    bench.step()
    assert program.seen[0].sampling is None
    assert program.seen[0].logits_rows.tolist() == []


SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True),
    "everything": SamplingParams(
        max_tokens=50,
        temperature=0.7,
        top_p=0.9,
        top_k=12,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5, 9: -100.0},
        ignore_eos=True,
    ),
    "huge top_k": SamplingParams(max_tokens=50, top_k=2**31 - 1, ignore_eos=True),
    "min_tokens": SamplingParams(max_tokens=50, min_tokens=40, logit_bias={1: 2.0, 5: 3.0}, stop_token_ids=(9,)),
    "stops": SamplingParams(max_tokens=50, stop_token_ids=(7, 8, 9)),
    "bad words": SamplingParams(max_tokens=50, ignore_eos=True, bad_words=((3,), (4, 5), (4, 6, 4), (30, 31))),
    "few tokens": SamplingParams(max_tokens=50, allowed_token_ids=(4, 5, 6), logit_bias={4: 2.0, 9: 1.0}),
    "both, and min_tokens": SamplingParams(
        max_tokens=50, min_tokens=40, allowed_token_ids=(1, 4, 5, 6), bad_words=((4, 4), (5, 5), (4, 5, 6), (4, 5, 1))
    ),
}


@pytest.mark.parametrize("caching", [True, False])
def test_each_request_gets_its_own_tokens(caching: bool) -> None:
    requests = [
        make_request(f"{name} {length}", [seed, *range(length)], sampling=sampling, seed=seed, choice_index=seed)
        for seed, (name, sampling) in enumerate(SAMPLINGS.items())
        for length in (1, 31, 32, 40)
    ]
    bench = Bench(FakeProgram(num_blocks=8), max_num_seqs=7, budget=41, caching=caching)
    bench.add(*requests)
    output = bench.finish()
    for request in requests:
        assert output[request.request_id] == expected_output(request), request.request_id
    assert bench.scheduler.num_preemptions > 0


def test_until_min_tokens_nothing_stops() -> None:
    sampling = SamplingParams(max_tokens=200, min_tokens=100, stop_token_ids=tuple(range(10, 30)))
    request = make_request("a", [1, 2, 3], sampling=sampling)
    bench = Bench(FakeProgram(num_blocks=16))
    bench.add(request)
    output = bench.finish()["a"]
    assert len(output) > 100
    assert not {*EOS, *range(10, 30)} & set(output[:100])
    assert output == expected_output(request)


def test_a_top_k_beyond_int32_is_as_good_as_none() -> None:
    program = Recorder()
    bench = Bench(program)
    bench.add(make_request("a", [1], sampling=SamplingParams(max_tokens=1, top_k=2**40)))
    bench.step()
    sampling = program.seen[0].sampling
    assert sampling is not None
    assert sampling.top_k.tolist() == [2**31 - 1]


def test_arrays_stay_usable_after_a_failed_step() -> None:
    program = FakeProgram(num_blocks=16)
    bench = Bench(program)
    request = make_request("a", [1, 2, 3])
    bench.add(request)
    plan = bench.scheduler.schedule()
    program.fail_with = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        bench.runner.run(plan)
    bench.scheduler.drop(plan)
    assert bench.finish()["a"] == expected_output(request)


def test_time_in_the_program_is_counted_by_the_clock() -> None:
    ticks = iter(range(100))
    program = FakeProgram(num_blocks=16)
    bench = Bench(program)
    bench.runner = Runner(
        program,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=MAX_LEN,
        vocab_size=program.spec.vocab_size,
        clock=lambda: float(next(ticks)),
    )
    bench.add(make_request("a", [1, 2, 3], sampling=SamplingParams(max_tokens=4, ignore_eos=True)))
    bench.finish()
    assert bench.runner.num_steps == 4
    assert bench.runner.step_seconds == 4.0


def test_bad_words_are_looked_for_in_the_output_alone() -> None:
    """What a prompt ends with begins no word; what a resumed request has written does."""
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, allowed_token_ids=(4, 5), bad_words=((4, 4), (5, 4, 5)))
    program = Recorder()
    bench = Bench(program)
    bench.add(
        make_request("fresh", [5, 4], sampling=sampling), make_request("resumed", [9, 9, 5], sampling=sampling,
        output_token_ids=[4]),
    )  # fmt: skip
    bench.step()

    def forbidden(row: int) -> set[int]:
        how = program.seen[0].sampling
        assert how is not None
        entries = slice(*how.bias_starts[row : row + 2])
        pairs = zip(how.bias_tokens[entries].tolist(), how.bias_values[entries].tolist(), strict=True)
        return {token for token, value in pairs if value == -float("inf")} & {4, 5}

    assert (forbidden(0), forbidden(1)) == (set(), {4})
    assert bench.finish()["resumed"][:2] == [4, 5]
