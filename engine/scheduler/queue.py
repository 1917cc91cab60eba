"""The waiting queue."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from engine.scheduler.sequence import Sequence


class WaitingQueue:
    """Sequences by (priority, arrival), the smallest first. Push and pop are O(log n), removal O(log n) amortized.

    Removal leaves a hole in the heap; holes are swept when they outnumber what waits.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, _Entry]] = []
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (entry.seq for entry in self._entries.values())

    def push(self, seq: Sequence) -> None:
        request_id = seq.request.request_id
        assert request_id not in self._entries, f"{request_id} waits already"
        entry = self._entries[request_id] = _Entry(seq)
        heapq.heappush(self._heap, (*seq.key, entry))

    def peek(self) -> Sequence | None:
        """The next one, or None when nobody waits."""
        while self._heap and not self._heap[0][2].waits:
            heapq.heappop(self._heap)
        return self._heap[0][2].seq if self._heap else None

    def pop(self) -> Sequence:
        seq = self.peek()
        assert seq is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        del self._entries[seq.request.request_id]
        return seq

    def remove(self, request_id: str) -> Sequence:
        entry = self._entries.pop(request_id)
        entry.waits = False
        if len(self._heap) > 2 * len(self._entries) + 16:
            self._heap = [item for item in self._heap if item[2].waits]
            heapq.heapify(self._heap)
        return entry.seq


class _Entry:
    """One stay in the queue. Heap items never compare it: (priority, arrival) is unique among those that wait."""

    __slots__ = ("seq", "waits")

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self.waits = True

    def __lt__(self, other: _Entry) -> bool:
        # A hole may share its key with a later stay of the same sequence; their order is of no consequence.
        return self.waits < other.waits
