"""The scheduler's rules one by one. A "program" here is a rule for the next token; `test_machine.py` mixes them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from engine.config import BLOCK_SIZE
from engine.errors import ContextLengthError, RequestError
from engine.request import FinishReason, SamplingParams, TokenDelta
from engine.scheduler.plan import Plan
from engine.scheduler.scheduler import Propose, Scheduler
from engine.scheduler.sequence import Sequence
from tests.engine.fakes import make_request

EOS = 2


def make_scheduler(
    *,
    num_blocks: int = 64,
    max_model_len: int = 512,
    max_num_seqs: int = 8,
    budget: int = 64,
    caching: bool = True,
    propose: Propose | None = None,
    clock: Callable[[], float] = lambda: 0.0,
) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        max_model_len=min(max_model_len, num_blocks * BLOCK_SIZE),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        propose=propose,
        eos_token_ids=(EOS,),
        clock=clock,
    )


def prompt(length: int, first: int = 100) -> list[int]:
    return [first, *range(1000, 999 + length)]


def forever(max_tokens: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def step(scheduler: Scheduler, token: Callable[[Sequence], int] = lambda seq: 7) -> tuple[Plan, list[TokenDelta]]:
    plan = scheduler.schedule()
    scheduler.check_integrity()
    deltas = scheduler.update(plan, [token(i.seq) for i in plan.items if i.samples]) if plan.items else []
    scheduler.check_integrity()
    return plan, plan.ended + deltas


def finish(scheduler: Scheduler, token: Callable[[Sequence], int] = lambda seq: 7) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    for _ in range(10_000):
        if not scheduler.has_work:
            assert scheduler.pool.num_free == scheduler.pool.num_blocks
            return deltas
        deltas += step(scheduler, token)[1]
    raise AssertionError("some request never ends")


def shape(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(i.seq.request.request_id, i.start, i.num_tokens, i.samples) for i in plan.items]


def tokens_of(deltas: Iterable[TokenDelta], request_id: str) -> list[int]:
    return [token for delta in deltas if delta.request_id == request_id for token in delta.token_ids]


# Budget and order


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make_scheduler(budget=64)
    scheduler.add(make_request("a", prompt(150), sampling=forever(2)))
    assert shape(step(scheduler)[0]) == [("a", 0, 64, False)]
    assert shape(step(scheduler)[0]) == [("a", 64, 64, False)]
    plan, deltas = step(scheduler)
    assert shape(plan) == [("a", 128, 22, True)]
    assert [(d.position, d.token_ids, d.finish_reason) for d in deltas] == [(0, [7], None)]
    plan, deltas = step(scheduler)
    assert shape(plan) == [("a", 150, 1, True)]
    assert [(d.position, d.token_ids, d.finish_reason) for d in deltas] == [(1, [7], FinishReason.LENGTH)]
    assert not scheduler.has_work


def test_decoding_goes_first_and_chunks_fill_the_budget() -> None:
    scheduler = make_scheduler(budget=64)
    scheduler.add(make_request("a", prompt(10, first=1), sampling=forever()))
    scheduler.add(make_request("b", prompt(20, first=2), sampling=forever()))
    scheduler.add(make_request("c", prompt(100, first=3), sampling=forever()))
    scheduler.add(make_request("d", prompt(100, first=4), sampling=forever()))
    assert shape(step(scheduler)[0]) == [("a", 0, 10, True), ("b", 0, 20, True), ("c", 0, 34, False)]
    assert shape(step(scheduler)[0]) == [("a", 10, 1, True), ("b", 20, 1, True), ("c", 34, 62, False)]
    assert shape(step(scheduler)[0]) == [
        ("a", 11, 1, True),
        ("b", 21, 1, True),
        ("c", 96, 4, True),
        ("d", 0, 58, False),
    ]


def test_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("late", 5), ("first", 1), ("urgent", -1), ("second", 1)):
        scheduler.add(make_request(name, prompt(5), sampling=forever(1), priority=priority))
    assert [delta.request_id for delta in finish(scheduler)] == ["urgent", "first", "second", "late"]


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=3)
    for index in range(5):
        scheduler.add(make_request(f"r{index}", prompt(4, first=index), sampling=forever(3)))
    step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 2)
    finish(scheduler)


# Ends


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason", "stop_token_id"),
    [
        (SamplingParams(max_tokens=3), [7, 7, 7], FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=9), [7, EOS], FinishReason.STOP, EOS),
        (SamplingParams(max_tokens=2), [7, EOS], FinishReason.STOP, EOS),
        (SamplingParams(max_tokens=3, ignore_eos=True), [7, EOS, 7], FinishReason.LENGTH, None),
        (SamplingParams(max_tokens=9, stop_token_ids=(8,)), [7, 7, 8], FinishReason.STOP, 8),
        (SamplingParams(max_tokens=9, stop_token_ids=(8,), ignore_eos=True), [EOS, 8], FinishReason.STOP, 8),
        (SamplingParams(), [7] * 22, FinishReason.LENGTH, None),  # the context of 32 is full
        (SamplingParams(max_tokens=100), [7] * 22, FinishReason.LENGTH, None),
    ],
)
def test_what_ends_a_request(
    sampling: SamplingParams, tokens: list[int], reason: FinishReason, stop_token_id: int | None
) -> None:
    scheduler = make_scheduler(max_model_len=32)
    scheduler.add(make_request("a", prompt(10), sampling=sampling))
    deltas = finish(scheduler, lambda seq: tokens[seq.num_output])
    assert tokens_of(deltas, "a") == tokens
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(tokens) - 1)
    assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == (reason, stop_token_id)
    assert [delta.position for delta in deltas] == list(range(len(tokens)))


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(max_model_len=64)
    with pytest.raises(ContextLengthError, match="maximum context length is 64 tokens, and the prompt has 64"):
        scheduler.add(make_request("a", prompt(64)))
    with pytest.raises(RequestError, match=r"prompt \(60 tokens\) and output_token_ids \(5\) exceed the context of 64"):
        scheduler.add(make_request("a", prompt(60), output_token_ids=[7] * 5))
    scheduler.add(make_request("a", prompt(63)))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(make_request("a", prompt(3)))
    assert tokens_of(finish(scheduler), "a") == [7]


def test_resumed_output_counts_as_output() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(40), sampling=forever(5), output_token_ids=[5, 6, 7]))
    plan, deltas = step(scheduler)
    assert shape(plan) == [("a", 0, 43, True)]
    deltas += finish(scheduler)
    assert [(d.position, d.token_ids) for d in deltas] == [(3, [7]), (4, [7])]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("output", "reason", "stop"),
    [([5] * 4, FinishReason.LENGTH, None), ([5, EOS], FinishReason.STOP, EOS)],
)
def test_resumed_after_its_last_token_it_ends_at_once(output: list[int], reason: FinishReason, stop: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(5), sampling=SamplingParams(max_tokens=4), output_token_ids=output))
    assert scheduler.has_work
    plan, deltas = step(scheduler)
    assert plan.items == []
    expected = TokenDelta(request_id="a", position=len(output), finish_reason=reason, stop_token_id=stop)
    assert deltas == [expected]
    assert not scheduler.has_work


def test_deadline_ends_waiting_and_running() -> None:
    now = [100.0]
    scheduler = make_scheduler(max_num_seqs=1, clock=lambda: now[0])
    scheduler.add(make_request("runs", prompt(5), sampling=forever(), deadline=102.0))
    scheduler.add(make_request("waits", prompt(5), sampling=forever(), deadline=101.0))
    scheduler.add(make_request("none", prompt(5), sampling=forever(1)))
    assert tokens_of(step(scheduler)[1], "runs") == [7]
    now[0] = 101.0
    _, deltas = step(scheduler)
    assert [(d.request_id, d.finish_reason, d.position) for d in deltas] == [
        ("waits", FinishReason.DEADLINE, 0),
        ("runs", None, 1),
    ]
    now[0] = 103.0
    deltas = finish(scheduler)
    assert [(d.request_id, d.finish_reason) for d in deltas] == [
        ("runs", FinishReason.DEADLINE),
        ("none", FinishReason.LENGTH),
    ]
    assert deltas[0].position == 2


def test_ended_deadlines_do_not_pile_up() -> None:
    scheduler = make_scheduler()
    for index in range(200):
        scheduler.add(make_request(f"r{index}", prompt(3), sampling=forever(1), deadline=1e12))
        finish(scheduler)
    assert len(scheduler._deadlines) < 40


# Abort


def test_abort_while_waiting_running_and_computed() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, prompt(40, first=ord(name)), sampling=forever()))
    step(scheduler)
    assert scheduler.abort("c")  # waits
    assert scheduler.abort("a")  # runs
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert [item.seq.request.request_id for item in plan.items] == ["b"]
    assert scheduler.abort("b")  # is being computed
    assert not scheduler.abort("b")
    scheduler.check_integrity()
    assert scheduler.pool.num_free < scheduler.pool.num_blocks, "blocks under a running step must stay"
    assert scheduler.update(plan, [7]) == []
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_an_aborted_id_may_be_used_again_at_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(5), sampling=forever()))
    plan = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add(make_request("a", prompt(5), sampling=forever(2)))
    assert scheduler.update(plan, [9]) == []
    assert tokens_of(finish(scheduler), "a") == [7, 7]


def test_abort_before_the_end_was_told() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(5), sampling=forever(1), output_token_ids=[7]))
    scheduler.abort("a")
    assert not scheduler.has_work


# Preemption


def test_the_last_in_order_is_preempted_and_loses_no_token() -> None:
    # Two requests grow to 3 blocks each in a memory of 4.
    scheduler = make_scheduler(num_blocks=4, max_model_len=96, caching=False)
    scheduler.add(make_request("a", prompt(30, first=1), sampling=forever(60)))
    scheduler.add(make_request("b", prompt(30, first=2), sampling=forever(60)))
    deltas = finish(scheduler, lambda seq: seq.num_output + 10)
    for name in ("a", "b"):
        assert tokens_of(deltas, name) == list(range(10, 70))
        assert [d.position for d in deltas if d.request_id == name] == list(range(60))
    assert scheduler.num_preemptions == 1
    assert [d.request_id for d in deltas if d.finish_reason] == ["a", "b"]


def test_a_preempted_request_waits_in_its_old_place() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=96, max_num_seqs=2, caching=False)
    scheduler.add(make_request("low", prompt(30, first=1), sampling=forever(60), priority=1))
    scheduler.add(make_request("high", prompt(30, first=2), sampling=forever(60), priority=0))
    scheduler.add(make_request("later", prompt(30, first=3), sampling=forever(1), priority=1))
    ends = [d.request_id for d in finish(scheduler) if d.finish_reason]
    assert scheduler.num_preemptions == 1
    assert ends == ["high", "later", "low"] or ends == ["high", "low", "later"]
    # `low` was back in the queue in front of `later`, so it ran again first; `later` only had less to do.
    assert scheduler.num_prompt_tokens == 30 * 4


def test_recomputation_reuses_what_the_prefix_cache_kept() -> None:
    # `b` takes the fifth block first; `a` needs it later, and takes it from `b`.
    scheduler = make_scheduler(num_blocks=5, max_model_len=96, budget=128)
    scheduler.add(make_request("a", prompt(40, first=1), sampling=forever(40)))
    scheduler.add(make_request("b", prompt(62, first=2), sampling=forever(30)))
    deltas = finish(scheduler)
    assert scheduler.num_preemptions == 1
    assert len(tokens_of(deltas, "b")) == 30
    assert {d.num_cached_tokens for d in deltas} == {0}, "a recomputation's hits are not the caller's"
    assert scheduler.num_prompt_tokens == 40 + 62, "the whole prompt of `b` was found again"


def test_a_stalled_prefill_waits_and_nobody_is_admitted_past_it() -> None:
    scheduler = make_scheduler(num_blocks=6, max_model_len=192, budget=64, max_num_seqs=4, caching=False)
    scheduler.add(make_request("a", prompt(60, first=1), sampling=forever(130)))
    _, deltas = step(scheduler)
    scheduler.add(make_request("b", prompt(90, first=2), sampling=forever(1)))
    scheduler.add(make_request("c", prompt(3, first=3), sampling=forever(1)))
    deltas += finish(scheduler)
    order = [delta.request_id for delta in deltas if delta.finish_reason]
    assert order.index("b") < order.index("c")
    assert len(tokens_of(deltas, "a")) == 130


def test_a_sequence_preempted_within_a_plan_leaves_the_plan() -> None:
    scheduler = make_scheduler(num_blocks=5, max_model_len=160, budget=2, max_num_seqs=2, caching=False)
    scheduler.add(make_request("low", prompt(30, first=1), sampling=forever(100), priority=1))
    deltas: list[TokenDelta] = []
    while not scheduler.num_output_tokens:
        deltas += step(scheduler)[1]
    scheduler.add(make_request("high", prompt(96, first=2), sampling=forever(1)))
    while not scheduler.num_preemptions:
        plan, more = step(scheduler)
        deltas += more
    # `low` had one token planned when `high` came to need a third block for its prompt.
    assert shape(plan) == [("high", 64, 1, False)]
    assert plan.num_tokens == 1
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    assert len(tokens_of(deltas + finish(scheduler), "low")) == 100


def test_admission_leaves_running_requests_their_next_block() -> None:
    scheduler = make_scheduler(num_blocks=3, max_model_len=96)
    scheduler.add(make_request("a", prompt(32, first=1), sampling=forever()))
    step(scheduler)
    scheduler.add(make_request("b", prompt(33, first=2), sampling=forever(1)))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 32, 1, True)]
    finish(scheduler)
    assert scheduler.num_preemptions == 0


# Prefix cache


def test_the_second_of_two_equal_prompts_computes_only_its_end() -> None:
    scheduler = make_scheduler(budget=512)
    scheduler.add(make_request("a", prompt(100), sampling=forever(1)))
    finish(scheduler)
    scheduler.add(make_request("b", prompt(100), sampling=forever(1)))
    plan, deltas = step(scheduler)
    assert shape(plan) == [("b", 96, 4, True)]
    assert [delta.num_cached_tokens for delta in deltas] == [96]
    assert (scheduler.num_cached_tokens, scheduler.num_prompt_tokens) == (96, 104)
    assert (scheduler.prefix.num_hit_blocks, scheduler.prefix.num_missed_blocks) == (3, 3)


@pytest.mark.parametrize("other", [{"tenant": "t"}, {"cache_salt": "s"}])
def test_other_salts_share_nothing(other: dict[str, str]) -> None:
    scheduler = make_scheduler(budget=512)
    scheduler.add(make_request("a", prompt(100), sampling=forever(1)))
    finish(scheduler)
    scheduler.add(make_request("b", prompt(100), sampling=forever(1), **other))  # type: ignore[arg-type]
    assert [delta.num_cached_tokens for delta in finish(scheduler)] == [0]


def test_an_answer_is_reused_by_the_next_turn() -> None:
    scheduler = make_scheduler(budget=512)
    scheduler.add(make_request("a", prompt(60), sampling=forever(40)))
    answer = tokens_of(finish(scheduler), "a")
    scheduler.add(make_request("b", [*prompt(60), *answer, 9], sampling=forever(1)))
    assert [delta.num_cached_tokens for delta in finish(scheduler)] == [96]


def test_concurrent_equal_prompts_are_not_mixed_up() -> None:
    scheduler = make_scheduler(budget=512)
    for name in ("a", "b"):
        scheduler.add(make_request(name, prompt(100), sampling=forever(3)))
    plan, _ = step(scheduler)
    assert [count for _, _, count, _ in shape(plan)] == [100, 100]
    finish(scheduler)
    assert scheduler.pool.num_idle == 3


# Siblings


def siblings(count: int, length: int = 100) -> list[tuple[str, int]]:
    return [(f"c{index}", index) for index in range(count)]


def test_siblings_wait_for_choice_0_to_fill_the_prefix() -> None:
    scheduler = make_scheduler(budget=64)
    for name, index in siblings(3):
        scheduler.add(make_request(name, prompt(100), sampling=forever(2), choice_index=index, group_id="g"))
    assert shape(step(scheduler)[0]) == [("c0", 0, 64, False)]
    assert scheduler.num_waiting == 2
    assert shape(step(scheduler)[0]) == [("c0", 64, 36, True)]
    assert shape(step(scheduler)[0]) == [("c0", 100, 1, True), ("c1", 96, 4, True), ("c2", 96, 4, True)]
    deltas = finish(scheduler)
    assert {delta.num_cached_tokens for delta in deltas} == {96}


@pytest.mark.parametrize("how", ["abort", "deadline", "error"])
def test_siblings_go_when_choice_0_ends_before(how: str) -> None:
    now = [0.0]
    scheduler = make_scheduler(budget=64, clock=lambda: now[0])
    for name, index in siblings(2):
        deadline = 1.0 if how == "deadline" and index == 0 else None
        scheduler.add(
            make_request(name, prompt(100), sampling=forever(2), choice_index=index, group_id="g", deadline=deadline)
        )
    step(scheduler)
    now[0] = 2.0
    if how == "abort":
        scheduler.abort("c0")
    elif how == "error":
        scheduler.fail(scheduler.schedule(), "broken")
    scheduler.check_integrity()
    assert tokens_of(finish(scheduler), "c1") == [7, 7]


def test_siblings_do_not_wait_without_a_reason() -> None:
    scheduler = make_scheduler(budget=512)
    scheduler.add(make_request("alone", prompt(100, first=1), choice_index=3, group_id="gone"))
    for name, index in siblings(2):
        scheduler.add(make_request(name, prompt(20), sampling=forever(2), choice_index=index, group_id="short"))
    assert len(step(scheduler)[0].items) == 3
    uncached = make_scheduler(budget=512, caching=False)
    for name, index in siblings(2):
        uncached.add(make_request(name, prompt(100), sampling=forever(2), choice_index=index, group_id="g"))
    assert len(step(uncached)[0].items) == 2


def test_held_siblings_can_be_aborted_and_expire() -> None:
    now = [0.0]
    scheduler = make_scheduler(budget=64, clock=lambda: now[0])
    for name, index in siblings(3):
        deadline = 1.0 if index == 2 else None
        scheduler.add(make_request(name, prompt(100), choice_index=index, group_id="g", deadline=deadline))
    step(scheduler)
    assert scheduler.abort("c1")
    scheduler.check_integrity()
    now[0] = 1.0
    _, deltas = step(scheduler)
    assert [(delta.request_id, delta.finish_reason) for delta in deltas if delta.finish_reason] == [
        ("c2", FinishReason.DEADLINE)
    ]
    finish(scheduler)


# Failures


def test_a_failed_step_ends_its_requests_and_spares_the_others() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in ("a", "b", "c"):
        scheduler.add(make_request(name, prompt(5, first=ord(name)), sampling=forever(2)))
    plan = scheduler.schedule()
    scheduler.abort("b")
    deltas = scheduler.fail(plan, "boom")
    assert [(d.request_id, d.finish_reason, d.error) for d in deltas] == [("a", FinishReason.ERROR, "boom")]
    scheduler.check_integrity()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert tokens_of(finish(scheduler), "c") == [7, 7]


def test_a_request_for_which_no_token_can_be_chosen_ends_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("stuck", prompt(5), sampling=forever(4)))
    scheduler.add(make_request("fine", prompt(5, first=9), sampling=forever(4)))
    deltas = finish(scheduler, lambda seq: -1 if seq.request.request_id == "stuck" and seq.num_output == 1 else 7)
    ends = {delta.request_id: delta for delta in deltas if delta.finish_reason}
    assert ends["stuck"].finish_reason is FinishReason.ERROR and "No token" in (ends["stuck"].error or "")
    assert ends["stuck"].position == 1 and not ends["stuck"].token_ids
    assert ends["fine"].finish_reason is FinishReason.LENGTH and ends["fine"].position == 3


def test_a_dropped_plan_is_scheduled_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(40), sampling=forever(2)))
    scheduler.add(make_request("b", prompt(4), sampling=forever(2)))
    plan = scheduler.schedule()
    scheduler.abort("b")
    scheduler.drop(plan)
    scheduler.check_integrity()
    assert shape(step(scheduler)[0]) == [("a", 0, 40, True)]
    assert len(tokens_of(finish(scheduler), "a")) == 1


def test_misuse_is_caught() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(4)))
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="before the last plan's update"):
        scheduler.schedule()
    with pytest.raises(AssertionError, match="not the one under way"):
        scheduler.update(Plan(), [])
    with pytest.raises(AssertionError, match="more tokens than the plan samples"):
        scheduler.update(plan, [7, 7])


def test_plan_reads_well_in_a_log() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt(4)))
    scheduler.add(make_request("b", prompt(100)))
    assert str(scheduler.schedule()) == "64 tokens of 2 requests: a[0:4]* b[0:60]"


# Guesses


def guessing(draft: list[int], **options: Any) -> Scheduler:
    """A scheduler whose sequences always guess `draft`, with a request at its first decode step."""
    scheduler = make_scheduler(propose=lambda seq, most: draft[:most], **options)
    scheduler.add(make_request("a", prompt(10), sampling=forever(20)))
    step(scheduler)
    return scheduler


def judged(scheduler: Scheduler, chosen: list[int]) -> list[TokenDelta]:
    deltas = scheduler.update(scheduler.schedule(), chosen)
    scheduler.check_integrity()
    return deltas


@pytest.mark.parametrize(
    ("chosen", "new"),
    [
        ([5, 6, 7], [5, 6, 7]),  # both right, and one more
        ([5, 9, 7], [5, 9]),  # what follows a wrong one was chosen after something else
        ([9, 6, 7], [9]),
        ([5, 6, 6], [5, 6, 6]),
    ],
)
def test_guesses_count_as_far_as_they_are_right(chosen: list[int], new: list[int]) -> None:
    scheduler = guessing([5, 6])
    plan = scheduler.schedule()
    assert shape(plan) == [("a", 10, 3, True)]
    assert plan.items[0].num_rows == 3
    (delta,) = scheduler.update(plan, chosen)
    scheduler.check_integrity()
    assert (delta.token_ids, delta.position) == (new, 1)
    assert (scheduler.num_draft_tokens, scheduler.num_accepted_tokens) == (2, len(new) - 1)
    assert scheduler.num_output_tokens == 1 + len(new)
    assert shape(scheduler.schedule())[0][1] == 10 + len(new)  # what was computed of right guesses is kept


def test_a_stop_token_among_right_guesses_ends_the_request_there() -> None:
    scheduler = make_scheduler(propose=lambda seq, most: [5, EOS, 6][:most])
    scheduler.add(make_request("a", prompt(10), sampling=SamplingParams(max_tokens=20)))
    step(scheduler)
    (delta,) = judged(scheduler, [5, EOS, 6, 7])
    assert (delta.token_ids, delta.finish_reason, delta.stop_token_id) == ([5, EOS], FinishReason.STOP, EOS)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_guesses_do_not_pass_max_tokens() -> None:
    scheduler = guessing([5] * 8)
    finished = [judged(scheduler, [5] * 8), judged(scheduler, [5] * 8), judged(scheduler, [5] * 3)]
    assert [len(delta.token_ids) for (delta,) in finished] == [8, 8, 3]
    assert finished[-1][0].finish_reason is FinishReason.LENGTH


def test_a_choice_that_fails_after_right_guesses_ends_the_request_with_them() -> None:
    first, last = judged(guessing([5, 6]), [5, -1, 7])
    assert (first.token_ids, first.finish_reason) == ([5], None)
    assert (last.token_ids, last.finish_reason, last.position) == ([], FinishReason.ERROR, 2)


def test_nobody_guesses_beside_a_prompt() -> None:
    scheduler = guessing([5, 6])
    scheduler.add(make_request("b", prompt(40, 9), sampling=forever(20)))
    assert shape(scheduler.schedule()) == [("a", 10, 1, True), ("b", 0, 40, True)]


def test_a_crowd_makes_no_guesses() -> None:
    scheduler = make_scheduler(max_num_seqs=12, propose=lambda seq, most: [5] * most)
    for index in range(12):
        scheduler.add(make_request(f"r{index}", prompt(2, index), sampling=forever(9)))
    step(scheduler)
    plan = scheduler.schedule()
    assert plan.num_tokens == len(plan.items) == 12


def test_rows_are_shared_by_few() -> None:
    scheduler = make_scheduler(propose=lambda seq, most: [5] * min(3, most))
    for index in range(5):
        scheduler.add(make_request(f"r{index}", prompt(2, index), sampling=forever(9)))
    step(scheduler)
    assert [item.num_tokens for item in scheduler.schedule().items] == [4, 1, 1, 1, 1]


def test_guesses_take_no_block_from_anybody() -> None:
    scheduler = make_scheduler(num_blocks=4, propose=lambda seq, most: [5] * min(4, most))
    scheduler.add(make_request("a", prompt(61, 1), sampling=forever(20)))
    step(scheduler)
    held = scheduler.pool.allocate(2)  # all that are left
    plan = scheduler.schedule()
    assert shape(plan) == [("a", 61, 3, True)]  # to the end of its block
    scheduler.drop(plan)
    scheduler.pool.release(held)
    assert shape(scheduler.schedule()) == [("a", 61, 5, True)]


# Beginnings of blocks


def parting(scheduler: Scheduler, num_same: int) -> Plan:
    """The plan that admits a prompt whose first tokens lie in a block of another one."""
    scheduler.add(make_request("a", prompt(40), sampling=forever(1)))
    finish(scheduler)
    scheduler.add(make_request("b", [*prompt(40)[:num_same], *range(5000, 5030)], sampling=forever(2)))
    plan = scheduler.schedule()
    scheduler.check_integrity()
    return plan


def test_a_prompt_that_parts_within_a_block_computes_what_differs() -> None:
    scheduler = make_scheduler()
    plan = parting(scheduler, 20)
    assert shape(plan) == [("b", 16, 34, True)]
    (copy,) = plan.copies
    assert (copy.num_tokens, copy.target) == (16, plan.items[0].seq.blocks[0])
    assert scheduler.pool.num_refs(copy.source) == 1
    (delta,) = scheduler.update(plan, [7])
    assert delta.num_cached_tokens == 16
    assert scheduler.pool.num_refs(copy.source) == 0
    finish(scheduler)


def test_a_step_that_was_not_made_copied_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.drop(parting(scheduler, 20))
    scheduler.check_integrity()
    plan, deltas = step(scheduler)
    assert (shape(plan), plan.copies) == ([("b", 0, 50, True)], [])
    assert [delta.num_cached_tokens for delta in deltas] == [0]
    assert scheduler.num_cached_tokens == 0
    finish(scheduler)


def test_who_is_aborted_while_its_copy_is_made_frees_what_it_held() -> None:
    scheduler = make_scheduler()
    plan = parting(scheduler, 20)
    scheduler.abort("b")
    scheduler.check_integrity()
    assert scheduler.update(plan, [7]) == []
    scheduler.check_integrity()
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_a_beginning_is_not_copied_where_its_block_has_to_go() -> None:
    """Of two blocks in all both are needed, so the one that begins the same cannot stay beside its copy."""
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_request("a", prompt(40), sampling=forever(1)))
    finish(scheduler)
    scheduler.add(make_request("b", [*prompt(40)[:20], *range(5000, 5020)], sampling=forever(2)))
    plan, _ = step(scheduler)
    assert (shape(plan), plan.copies) == ([("b", 0, 40, True)], [])
    finish(scheduler)
