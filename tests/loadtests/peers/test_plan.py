from __future__ import annotations

from itertools import pairwise

from loadtests.peers.plan import BARRED, OURS, Task, first_seed, num_requests, tasks, turns
from loadtests.peers.serving import FIRST_ID, LAST_ID, random_prompt

TASKS = tasks((1, 64), (128, 8064))


def test_every_pair_stands_together_and_alternates() -> None:
    groups: dict[str, list[tuple[Task, ...]]] = {"a": [(task,) for task in TASKS], "b": [TASKS]}
    order = list(turns(groups, rounds=4))
    assert len(order) == 4 * 2 * (len(TASKS) + 1)
    assert [turn.pair for turn in order] == ["a"] * (8 * len(TASKS)) + ["b"] * 8
    for first, second in zip(order[::2], order[1::2], strict=True):
        assert (first.round, first.pair, first.tasks) == (second.round, second.pair, second.tasks)
        assert {first.system, second.system} == {OURS, first.pair}
    of_one = [turn for turn in order[::2] if turn.pair == "b"]
    assert [turn.system for turn in of_one] == [OURS, "b", OURS, "b"]
    of_round = [turn for turn in order[::2] if turn.pair == "a" and turn.round == 0]
    assert all(one.system != other.system for one, other in pairwise(of_round))


def test_later_rounds_are_of_what_the_bars_compare() -> None:
    groups: dict[str, list[tuple[Task, ...]]] = {"openvino": [(task,) for task in TASKS], "vllm": [TASKS], "x": [TASKS]}
    order = list(turns(groups, rounds=7, whole=3))
    of_whole = [turn for turn in turns(groups, rounds=3) if turn.pair == "openvino"]
    assert [turn for turn in order if turn.pair == "openvino"][: len(of_whole)] == of_whole
    later = [turn for turn in order if turn.round >= 3]
    assert {turn.round for turn in later} == {3, 4, 5, 6}
    for pair in ("openvino", "vllm"):
        compared = [task for turn in later for task in turn.tasks if (turn.pair, turn.system) == (pair, OURS)]
        assert {task.name for task in compared} == BARRED[pair].keys()
        assert all(task.concurrency == (32,) for task in compared if task.kind == "serve")
        assert len(compared) == 4 * len(BARRED[pair])
    assert all(turn.pair != "x" for turn in later)


def test_every_bar_names_a_task() -> None:
    assert {name for of_peer in BARRED.values() for name in of_peer} <= {task.name for task in TASKS}


def test_the_order_is_the_same_every_time() -> None:
    groups = {"a": [(task,) for task in TASKS]}
    assert list(turns(groups, 3)) == list(turns(groups, 3))


def test_no_two_concurrencies_share_a_prompt() -> None:
    serve = TASKS[0]
    assert serve.concurrency == (1, 64)
    seeds = [range(first_seed(serve, n), first_seed(serve, n) + num_requests(n)) for n in (1, 4, 16, 32, 64)]
    assert len({seed for one in seeds for seed in one}) == sum(map(len, seeds))
    assert [num_requests(n) for n in (1, 4, 64)] == [3, 8, 128]


def test_random_prompts_are_fixed_and_differ_between_streams() -> None:
    decode = next(task for task in TASKS if task.name == "decode-32")
    prompts = [random_prompt(decode, number) for number in range(decode.streams)]
    assert prompts == [random_prompt(decode, number) for number in range(decode.streams)]
    assert len({tuple(one) for one in prompts}) == 32
    assert all(len(one) == 128 and min(one) >= FIRST_ID and max(one) < LAST_ID for one in prompts)
    single = next(task for task in TASKS if task.name == "decode-1")
    assert len(random_prompt(single, 0)) == 16


def test_a_trial_is_shorter() -> None:
    assert TASKS[0].trial().concurrency == (16,)
    for task in TASKS:
        assert task.trial().tokens < task.tokens or task.name.startswith("context")
