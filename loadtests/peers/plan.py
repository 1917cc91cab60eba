"""What is measured and in which order: tasks, pairs and turns, as plain data."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

OURS = "seraph"

BARRED: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "llamacpp": {"prefill-512": (), "decode-1": (), "decode-32": (), "context-8064": ()},
    "openvino": {"serve": (32,), "decode-32": ()},
    "vllm": {"serve": (32,)},
}
"""What the bars compare: of each peer, names of tasks and, of serving, concurrencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One load.

    `serve`: for each of `concurrency`, that many streams of chats (about 100 tokens each, `tokens` answered, more or
    less by up to `spread` of them; `waves` chats a stream), prompts included, preceded by a start that is timed.
    `prefill`: one prompt of `prompt` tokens. `decode`: `tokens` decoded by each of `streams` with a prompt of `prompt`
    tokens behind it, 0 for none, prompts not included.
    """

    name: str
    kind: str  # serve, prefill or decode
    family: str  # tasks of a family share the setting that was found best for one of them
    concurrency: tuple[int, ...] = ()
    waves: int = 2
    spread: float = 0.0
    streams: int = 1
    prompt: int = 0
    tokens: int = 128
    seconds: float = 300.0  # at most

    def trial(self) -> Task:
        """The same, short: to tell settings apart."""
        if self.kind == "serve":
            return replace(self, concurrency=(16,), tokens=48)
        return replace(self, tokens=min(self.tokens, 64))


@dataclass(frozen=True, slots=True)
class Turn:
    """One system's part of one pair in one round: its tasks, measured in one go."""

    round: int
    pair: str  # the peer that this is a comparison with
    system: str
    tasks: tuple[Task, ...]


def context_name(tokens: int) -> str:
    return f"context-{tokens}"


def tasks(concurrency: Sequence[int], contexts: Sequence[int]) -> tuple[Task, ...]:
    """Everything that a system is measured with."""
    return (
        Task(name="serve", kind="serve", family="serve", concurrency=tuple(concurrency), seconds=900.0),
        Task(name="prefill-512", kind="prefill", family="prefill", prompt=512),
        Task(name="decode-1", kind="decode", family="decode-1"),
        Task(name="decode-32", kind="decode", family="decode-32", streams=32, prompt=128),
        *(
            Task(name=context_name(n), kind="decode", family="context", prompt=n, tokens=64, seconds=600.0)
            for n in contexts
        ),
    )


def barred(pair: str, group: Sequence[Task]) -> tuple[Task, ...]:
    """What of the tasks a bar is about, beside this peer."""
    bars = BARRED.get(pair, {})
    return tuple(replace(task, concurrency=bars[task.name]) for task in group if task.name in bars)


def turns(groups: Mapping[str, Sequence[tuple[Task, ...]]], rounds: int, whole: int | None = None) -> Iterator[Turn]:
    """All turns in order. Ours and the peer's stand next to each other, and who comes first changes from one round to
    the next and from one group of tasks to the next, so that neither always meets the machine that the other left. One
    comparison is made after another, so that a run which is cut short has whole ones.

    `groups`: for each peer, the tasks that are measured in one go. Rounds after the first `whole` (None: all are whole)
    are of what the bars compare alone.
    """
    for pair, of_pair in groups.items():
        for number in range(rounds):
            wanted = of_pair
            if whole is not None and number >= whole:
                wanted = [rest for group in of_pair if (rest := barred(pair, group))]
            for position, group in enumerate(wanted):
                systems = (OURS, pair) if (number + position) % 2 == 0 else (pair, OURS)
                for system in systems:
                    yield Turn(number, pair, system, group)


def first_seed(task: Task, concurrency: int) -> int:
    """Seed of the first prompt at a concurrency: the same in every turn, far from those of any other."""
    return 1_000_000 + 10_000 * concurrency + zlib.crc32(task.name.encode()) % 1000


def num_requests(concurrency: int, waves: int = 2) -> int:
    """Requests that are answered at a concurrency."""
    return max(3, waves * concurrency)
