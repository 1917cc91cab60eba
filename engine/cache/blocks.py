"""Who uses which KV block. Numbers only: the memory itself belongs to the program.

Every block is in exactly one of three states:

    blank       nobody uses it and its contents mean nothing
    referenced  one or more sequences use it
    idle        nobody uses it, but the prefix cache can still find it; given away least recently used first

              allocate                     share
    blank  ------------->  referenced  <-----------  idle
           <-------------              ----------->
           release                     release, if kept
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Allocates, counts references to, and evicts blocks 0 to num_blocks - 1. Every operation is O(1) a block.

    `on_evict` is called with a kept block when it is given to someone else, before `allocate` returns it.
    """

    def __init__(self, num_blocks: int, *, on_evict: Callable[[int], None] | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._on_evict = on_evict
        self._refs = [0] * num_blocks
        self._kept = [False] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: the block touched last is reused first
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now: blank ones and idle ones."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def num_refs(self, block: int) -> int:
        return self._refs[block]

    def is_kept(self, block: int) -> bool:
        return self._kept[block]

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._blank) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each referenced once: blank ones first, then the idle ones unused for longest."""
        assert self.can_allocate(count), f"allocate({count}) with {self.num_free} blocks free"
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._kept[block] = False
                self.num_evictions += 1
                if self._on_evict is not None:
                    self._on_evict(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """Add a reference to a block that is referenced or idle."""
        if self._refs[block] == 0:
            assert block in self._idle, f"share({block}): the block is blank"
            del self._idle[block]
        self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each block. Of those that become idle, the first given is the first evicted."""
        for block in blocks:
            assert self._refs[block] > 0, f"release({block}): the block has no reference"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._kept[block]:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def keep(self, block: int) -> None:
        """From now on the referenced `block` becomes idle, not blank, when its last reference goes."""
        assert self._refs[block] > 0, f"keep({block}): the block has no reference"
        self._kept[block] = True

    def check_integrity(self, held: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError with the details if the books do not balance.

        `held` are the block lists of everyone who holds references; where given, the counts must match it exactly.
        """
        blank, idle = Counter(self._blank), set(self._idle)
        for block, refs in enumerate(self._refs):
            states = (refs > 0) + blank[block] + (block in idle)
            assert refs >= 0 and states == 1, (
                f"block {block} is in {states} states: {refs} references, {blank[block]} times blank, "
                f"idle {block in idle}"
            )
            assert not (block in idle and not self._kept[block]), f"block {block} is idle but not kept"
            assert not (blank[block] and self._kept[block]), f"block {block} is blank but kept"
        assert len(self._blank) + len(idle) + sum(r > 0 for r in self._refs) == self.num_blocks
        if held is not None:
            expected = Counter(block for blocks in held for block in blocks)
            for block, refs in enumerate(self._refs):
                assert refs == expected[block], f"block {block}: {refs} references, {expected[block]} holders"
