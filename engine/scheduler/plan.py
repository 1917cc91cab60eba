"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.request import TokenDelta, TokenLogprobs
from engine.scheduler.sequence import Sequence


@dataclass(slots=True)
class Scheduled:
    """Tokens start to start + num_tokens of one sequence."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool  # the last of them is the sequence's last: this step chooses its next token
    draft: list[int] = field(default_factory=list)  # of num_tokens, those guessed to follow the sequence's last
    num_scored: int = 0  # of num_tokens, those from seq.num_scored on after which the next prompt token is scored
    # Filled by the step where they are wanted: of the scored ones, then of the chosen ones.
    prompt_logprobs: list[TokenLogprobs] | None = None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def num_rows(self) -> int:
        """Tokens that the step chooses for it: the next, and what would follow each guess."""
        return 1 + len(self.draft) if self.samples else 0

    def describe(self) -> dict[str, object]:
        """For the log."""
        seq = self.seq
        return {
            "id": seq.request.request_id,
            "request_id": seq.request.trace,
            "start": self.start,
            "num_tokens": self.num_tokens,
            "num_cached_tokens": max(0, seq.num_cached_tokens),
            "samples": self.samples,
            "num_draft_tokens": len(self.draft),
        }


@dataclass(slots=True, frozen=True)
class Copy:
    """A sequence's block that begins as another one: that is copied over it before the step computes the rest."""

    seq: Sequence
    source: int  # referenced by the plan until it lands
    target: int
    num_tokens: int  # that are the same


@dataclass(slots=True)
class Plan:
    """Tokens per sequence, nothing else: one token after many (decoding) and many after none (prefill) are alike."""

    items: list[Scheduled] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    num_tokens: int = 0  # over all items
    num_scored: int = 0  # over all items
    ended: list[TokenDelta] = field(default_factory=list)  # requests that ended without computing (deadlines)

    def add(self, seq: Sequence, num_tokens: int) -> None:
        start = seq.num_computed
        end = start + num_tokens
        num_scored = 0
        if seq.num_scored < seq.num_to_score:
            num_scored = max(0, min(end, seq.num_to_score) - seq.num_scored)
        self.items.append(Scheduled(seq, start, num_tokens, end == len(seq.tokens), num_scored=num_scored))
        self.num_tokens += num_tokens
        self.num_scored += num_scored

    def guess(self, item: Scheduled, draft: list[int]) -> None:
        """Compute tokens that may follow the last one of a sequence, which `item` samples."""
        item.draft = draft
        item.num_tokens += len(draft)
        self.num_tokens += len(draft)

    def discard(self, seq: Sequence) -> None:
        """Take a sequence out again, if it is in: someone before it needs its blocks."""
        for index, item in enumerate(self.items):
            if item.seq is seq:
                self.num_tokens -= item.num_tokens
                self.num_scored -= item.num_scored
                del self.items[index]
                return

    def __str__(self) -> str:
        """The step's composition on one line: whose tokens, from where to where, * where it chooses the next."""
        parts = (
            f"{item.seq.request.request_id}[{item.start}:{item.start + item.num_tokens}]{'*' * item.samples}"
            for item in self.items
        )
        return f"{self.num_tokens} tokens of {len(self.items)} requests: {' '.join(parts)}"
