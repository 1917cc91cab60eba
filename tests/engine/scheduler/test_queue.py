from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.queue import WaitingQueue
from engine.scheduler.sequence import Sequence
from tests.engine.fakes import make_request


def make_sequence(arrival: int, priority: int = 0) -> Sequence:
    request = make_request(f"r{arrival}", [1], priority=priority)
    return Sequence(request, arrival=arrival, eos_token_ids=(), max_model_len=8)


actions = st.lists(st.tuples(st.sampled_from(["push", "pop", "remove"]), st.integers(0, 5)), max_size=80)


@given(actions)
def test_it_is_a_sorted_list(actions: list[tuple[str, int]]) -> None:
    queue, model, arrivals = WaitingQueue(), list[Sequence](), 0
    for action, number in actions:
        if action == "push":
            seq = make_sequence(arrivals, priority=number)
            arrivals += 1
            queue.push(seq)
            model.append(seq)
            model.sort(key=lambda seq: seq.key)
        elif model and action == "pop":
            assert queue.pop() is model.pop(0)
        elif model:
            seq = model.pop(number % len(model))
            assert queue.remove(seq.request.request_id) is seq
            assert seq.request.request_id not in queue
        assert queue.peek() is (model[0] if model else None)
        assert len(queue) == len(model)
        assert {seq.key for seq in queue} == {seq.key for seq in model}


def test_a_sequence_may_come_back() -> None:
    queue = WaitingQueue()
    first, second = make_sequence(0), make_sequence(1)
    for _ in range(3):
        queue.push(first)
        queue.push(second)
        queue.remove("r0")
        queue.push(first)
        assert (queue.pop(), queue.pop()) == (first, second)


def test_holes_do_not_pile_up() -> None:
    queue = WaitingQueue()
    queue.push(make_sequence(0))
    for arrival in range(1, 500):
        queue.push(make_sequence(arrival))
        queue.remove(f"r{arrival}")
        assert len(queue._heap) <= 19
    assert queue.pop().arrival == 0


def test_misuse_is_caught() -> None:
    queue = WaitingQueue()
    with pytest.raises(AssertionError, match="empty"):
        queue.pop()
    queue.push(make_sequence(0))
    with pytest.raises(AssertionError, match="r0 waits already"):
        queue.push(make_sequence(0))
