"""What one rendering of a template may spend, and what it costs to look at a value."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Context

MAX_WORK = 50_000_000
"""Units of 10 to 20 ns that every rendering has: up to a second."""
WORK_PER_CHARACTER = 100
MAX_MADE = 16 << 20
"""Characters that every rendering may make, on the way to its output and as such; an item of a list counts as 16."""
MADE_PER_CHARACTER = 16
MAX_NESTED = 100
"""Depth of lists and dicts: beyond a few thousand, Python's own recursion in C would be at risk."""

BUDGET = "budget of this rendering"
"""The variable that holds it. No template can write this name."""

NODE, CALL, TURN, LOOK = 8, 200, 40, 40
"""Work: of a node of the syntax tree, a call, a turn of a loop, a look at a value."""
ITEM = 16
"""An item of a list, in characters and as work."""


class Budget:
    """What one rendering may still spend. `num_characters` is the size of what it is given."""

    def __init__(self, num_characters: int, max_work: int = MAX_WORK) -> None:
        self._work = max_work + WORK_PER_CHARACTER * num_characters
        self._made = MAX_MADE + MADE_PER_CHARACTER * num_characters

    def spend(self, work: int) -> None:
        """Raises SecurityError where no more is left."""
        self._work -= work
        if self._work < 0:
            raise SecurityError("it takes too many steps")

    def make(self, size: int) -> None:
        """Pay for characters that were or will be made."""
        self._made -= size
        if self._made < 0:
            raise SecurityError("it makes too much text")
        self.spend(size)

    def need_room(self, size: int) -> None:
        """Raise SecurityError where something of `size` characters could not be paid for; nothing is paid yet."""
        if size > self._made:
            raise SecurityError("it makes too much text")

    def weigh(self, value: object) -> int:
        """Pay for looking at all of a value, as printing or comparing it does; how many characters that is.

        Lists may be contained in one another many times, which makes their text grow exponentially: each time is paid.
        """
        if isinstance(value, str):
            self.spend(len(value))
            return len(value)
        total, left = 0, [(value, 0)]
        while left:
            one, depth = left.pop()
            if depth > MAX_NESTED:
                raise SecurityError(f"its data are nested deeper than {MAX_NESTED}")
            parts: Iterable[object] = ()
            if isinstance(one, str):
                size = len(one)
            elif isinstance(one, Mapping):
                size = 2 * ITEM * len(one)
                parts = (part for pair in one.items() for part in pair)
            elif isinstance(one, list | tuple | KeysView | ValuesView | ItemsView):
                size = ITEM * len(one)
                parts = one
            elif isinstance(one, range):
                size = len(one)
            else:
                size = ITEM + (one.bit_length() // 3 if isinstance(one, int) else 0)
            total += size
            self.spend(size + LOOK)  # before `left` grows
            left.extend((part, depth + 1) for part in parts)
        return total

    def search(self, haystack: object) -> None:
        """Pay for `in`."""
        if not isinstance(haystack, Mapping):
            self.weigh(haystack)

    def keep(self, made: Any) -> Any:
        """Pay for a result; what comes lazily pays item by item."""
        if isinstance(made, str):
            self.make(len(made))
        elif isinstance(made, list | tuple):
            self.make(ITEM * (1 + len(made)))
        elif isinstance(made, dict):
            self.make(4 * ITEM * (1 + len(made)))
        elif isinstance(made, Iterator):
            return self.each(made)
        return made

    def each(self, items: Iterable[Any], work: int = TURN) -> Iterator[Any]:
        """The items, each paid for as it is taken."""
        for item in items:
            self.spend(work)
            yield item

    def collect(self, items: Any) -> Any:
        """What is consumed anyway, as a list, so that it can be weighed."""
        return list(self.each(items, TURN + ITEM)) if isinstance(items, Iterator) else items

    def show(self, value: object) -> str:
        """str(value), paid for."""
        if isinstance(value, str):
            return value
        self.need_room(self.weigh(value))
        return str(value)


def budget_of(context: Context) -> Budget:
    """The budget of the rendering that `context` belongs to."""
    budget = context.parent[BUDGET]
    assert isinstance(budget, Budget)
    return budget
