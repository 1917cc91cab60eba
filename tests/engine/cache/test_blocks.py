from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.cache.blocks import BlockPool

NUM_BLOCKS = 7


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model that keeps holders as lists and idle blocks in an ordered dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(NUM_BLOCKS, on_evict=self.evicted.append)
        self.held: list[list[int]] = []
        self.kept: set[int] = set()
        self.idle: OrderedDict[int, None] = OrderedDict()

    def _in_use(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

    @rule(count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        num_blank = NUM_BLOCKS - len(self._in_use()) - len(self.idle)
        if not self.pool.can_allocate(count):
            assert count > num_blank + len(self.idle)
            with pytest.raises(AssertionError, match="blocks free"):
                self.pool.allocate(count)
            return
        expected = list(self.idle)[: max(0, count - num_blank)]
        self.evicted.clear()
        blocks = self.pool.allocate(count)
        assert self.evicted == expected
        assert len(set(blocks)) == count
        assert not set(blocks) & self._in_use()
        for block in expected:
            del self.idle[block]
            self.kept.discard(block)
        assert not set(blocks) & set(self.idle)
        self.held.append(blocks)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self._in_use())))
        self.pool.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.idle or any(self.held))
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self._in_use() | set(self.idle))))
        self.pool.share(block)
        self.idle.pop(block, None)
        self.held.append([block])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(blocks)
        for block in blocks:
            if block not in self._in_use() and block in self.kept:
                self.idle[block] = None

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.held)
        assert self.pool.num_free == NUM_BLOCKS - len(self._in_use())
        assert self.pool.num_idle == len(self.idle)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_goes_first() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, on_evict=evicted.append)
    a, b, c = pool.allocate(3)
    for block in (a, b, c):
        pool.keep(block)
    pool.release([b, a, c])
    pool.share(b)  # used again
    pool.release([b])
    pool.allocate(3)
    assert evicted == [a, c, b]
    assert pool.num_evictions == 3


def test_an_evicted_block_is_no_longer_kept() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1)
    pool.keep(block)
    pool.release([block])
    pool.release(pool.allocate(1))
    assert pool.num_idle == 0
    assert pool.num_free == 1


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="no reference"):
        pool.release([block])
    with pytest.raises(AssertionError, match="blank"):
        pool.share(block)
    with pytest.raises(AssertionError, match="no reference"):
        pool.keep(block)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        BlockPool(0)


def test_integrity_names_the_block() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    with pytest.raises(AssertionError, match=f"block {block}: 1 references, 0 holders"):
        pool.check_integrity([])
    pool._blank.append(block)
    with pytest.raises(AssertionError, match=f"block {block} is in 2 states"):
        pool.check_integrity()
