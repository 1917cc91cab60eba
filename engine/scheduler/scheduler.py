"""Chooses what each step computes, and keeps the books of what was computed.

The rules, in the order they are applied:

* Sequences are served by (priority, arrival). Running ones go first: those with one token left to compute (they
  decode), then those with more (chunked prefill), then new ones are admitted, all under one token budget.
* A sequence that lacks a block takes it from the running sequence that comes last. That one is preempted: its blocks
  go (what the prefix cache keeps of them can still be found), its tokens stay, and it waits in its old order to be
  recomputed.
* A sequence is admitted only if all its tokens fit beside what running ones will soon want: otherwise it would be
  preempted at once.
* Prompt tokens whose log-probabilities are wanted are computed, also where the prefix cache has them, and few a step:
  each needs a row of logits.
* Where a step would compute few tokens, sequences guess what follows and have it computed as well (lookup.py).
* The first in order can preempt all others and fits alone, so something always advances.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.cache.prefix import PARTS, PrefixCache
from engine.config import BLOCK_SIZE
from engine.errors import ContextLengthError, RequestError, SeraphError
from engine.request import FinishReason, Request, TokenDelta
from engine.scheduler.lookup import ROWS
from engine.scheduler.plan import Copy, Plan
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.sequence import Sequence, Status

MAX_SCORED = 128
"""Prompt tokens of one step that get logits: 25 MB of them with 49,152 tokens of vocabulary, 134 MB with 262,144."""

Propose = Callable[[Sequence, int], list[int]]


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


class Scheduler:
    """`schedule` and `update` alternate: what a plan names stays put until its update (or drop, or fail).

    `add` and `abort` may come at any time, also between the two. `propose` guesses at most so many tokens that follow a
    sequence (None: nobody does). `clock` gives Unix time in seconds, for deadlines.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        propose: Propose | None = None,
        eos_token_ids: tuple[int, ...] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        # Each of these would let a request wait for ever.
        assert max_model_len <= num_blocks * BLOCK_SIZE, "a sequence of max_model_len must fit alone"
        assert 1 <= max_num_seqs <= max_num_batched_tokens, "every running sequence must get a token a step"
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos_token_ids = eos_token_ids
        self._propose = propose
        self.prefix = PrefixCache(num_blocks, enabled=enable_prefix_caching)
        self.pool = self.prefix.pool

        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # computed; again where they were recomputed
        self.num_cached_tokens = 0
        self.num_output_tokens = 0
        self.num_draft_tokens = 0  # guessed
        self.num_accepted_tokens = 0  # of them, right
        self.num_finished = 0

        self._clock = clock
        self._live: dict[str, Sequence] = {}
        self._preparing: dict[str, Sequence] = {}  # live, but not to be queued before `release`
        self._queue = WaitingQueue()
        self._running: list[Sequence] = []  # by key
        self._leaders: dict[str, Sequence] = {}  # group id -> live choice 0
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; may name ended sequences
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_arrivals = 0
        self._num_admissions = 0
        self._in_flight: Plan | None = None
        self._ended: list[TokenDelta] = []  # for the next plan

    # What others see

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._live) - len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has anything to compute or to report."""
        return bool(self._live or self._ended)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._live

    # Requests come and go

    def add(self, request: Request, *, preparing: bool = False) -> None:
        """Queue a request; one that is still `preparing` only when it is released.

        Raises RequestError for an id that is live already, ContextLengthError where prompt and one token do not fit.
        """
        request_id = request.request_id
        if request_id in self._live:
            raise RequestError(f"request_id {request_id!r} is in use by a live request.", param="request_id")
        num_prompt = len(request.prompt_token_ids)
        if num_prompt >= self.max_model_len:
            raise ContextLengthError(max_model_len=self.max_model_len, num_tokens=num_prompt)
        if num_prompt + len(request.output_token_ids) > self.max_model_len:
            raise RequestError(
                f"prompt ({num_prompt} tokens) and output_token_ids ({len(request.output_token_ids)}) exceed the "
                f"context of {self.max_model_len} tokens.",
                param="output_token_ids",
            )
        seq = Sequence(
            request, arrival=self._num_arrivals, eos_token_ids=self.eos_token_ids, max_model_len=self.max_model_len
        )
        self._num_arrivals += 1
        if seq.num_output and (reason := seq.finish_reason()):  # resumed after its last token: nothing is left to do
            self.num_finished += 1
            self._ended.append(_last_delta(seq, reason))
            return
        self._live[request_id] = seq
        if request.deadline is not None:
            self._push_deadline(request.deadline, seq)
        if preparing:
            seq.status = Status.HELD
            self._preparing[request_id] = seq
        else:
            self._hold_or_queue(seq)

    def release(self, request_id: str, error: SeraphError | None = None) -> None:
        """Queue a request that was preparing, or end it with an error. One that has ended meanwhile is no error."""
        seq = self._preparing.get(request_id)
        if seq is None:
            return
        if error is None:
            del self._preparing[request_id]
            seq.status = Status.WAITING
            self._hold_or_queue(seq)
        else:
            self._end(seq)
            self._ended.append(_last_delta(seq, FinishReason.after(error), str(error)))

    def abort(self, request_id: str) -> bool:
        """End a request now, without a delta: nobody listens. Returns whether it was live.

        Blocks that a step under way may still write are freed by that step's update.
        """
        self._ended = [delta for delta in self._ended if delta.request_id != request_id]
        seq = self._live.get(request_id)
        if seq is not None:
            self._end(seq)
        return seq is not None

    # One step

    def schedule(self) -> Plan:
        """Choose the next step's tokens and allocate the blocks they go to."""
        assert self._in_flight is None, "schedule() before the last plan's update()"
        self._expire()
        plan = Plan(ended=self._ended)
        self._ended = []
        if self._schedule_running(plan):
            self._admit(plan)
        if self._propose is not None:
            self._guess(plan, self._propose)
        if plan.items:
            self._in_flight = plan
        return plan

    def update(self, plan: Plan, chosen: Seq[int]) -> list[TokenDelta]:
        """Enter what a step computed: `chosen` holds the tokens of each item of the plan that samples, in order.

        They are the next one and, after each that was guessed, what would follow it.

        A token below 0 says that none could be chosen: its request ends as refused where it allows some tokens only,
        and with FinishReason.ERROR otherwise.
        """
        self._land(plan)
        deltas: list[TokenDelta] = []
        num_entered = 0
        for item in plan.items:
            seq, draft, first = item.seq, item.draft, num_entered
            num_entered += item.num_rows
            if seq.status is Status.ENDED:  # aborted while the step ran
                self._free(seq)
                continue
            new: list[int] = []
            position, reason, failed = seq.num_output, None, False
            # Each was chosen after the guesses before it, so it counts as long as those were right.
            for token in chosen[first:num_entered]:
                if len(seq.tokens) >= seq.max_len:  # only the prompt was asked for
                    reason = FinishReason.LENGTH
                    break
                if token < 0:  # bias, mask and stop rules left nothing, or the logits were not numbers
                    failed = True
                    break
                seq.tokens.append(token)
                new.append(token)
                reason = seq.finish_reason()
                if reason is not None or len(new) > len(draft) or token != draft[len(new) - 1]:
                    break
            num_accepted = max(0, len(new) - 1)
            if draft:
                self._judge(seq, len(draft), num_accepted)
            self._computed(seq, item.start + item.num_tokens - len(draft) + num_accepted)
            if item.num_scored:
                seq.num_scored += item.num_scored
                seq.prompt_logprobs += item.prompt_logprobs or []
            if new or reason is not None:
                self.num_output_tokens += len(new)
                deltas.append(
                    TokenDelta(
                        request_id=seq.request.request_id,
                        position=position,
                        token_ids=new,
                        logprobs=item.logprobs[: len(new)] if item.logprobs else [],
                        prompt_logprobs=seq.prompt_logprobs,
                        finish_reason=reason,
                        stop_token_id=new[-1] if reason is FinishReason.STOP else None,
                        num_cached_tokens=seq.num_cached_tokens,
                    )
                )
                if seq.prompt_logprobs:
                    seq.prompt_logprobs = []  # the delta has them now
            if reason is not None:
                self._end(seq)
            elif failed:
                self._end(seq)
                deltas.append(_nothing_chosen(seq))
        assert num_entered == len(chosen), f"fewer or more tokens than the plan samples: {len(chosen)}"
        return deltas

    def drop(self, plan: Plan) -> None:
        """Forget a plan that was not computed; its tokens are scheduled anew."""
        self._land(plan)
        for copy in plan.copies:  # made or not: what it would have brought is computed
            copy.seq.num_computed -= copy.num_tokens
            if copy.seq.num_cached_tokens > copy.seq.num_computed:
                self.num_cached_tokens -= copy.seq.num_cached_tokens - copy.seq.num_computed
                copy.seq.num_cached_tokens = copy.seq.num_computed
        for item in plan.items:
            if item.seq.status is Status.ENDED:
                self._free(item.seq)

    def fail(self, plan: Plan, error: str) -> list[TokenDelta]:
        """End every request of a plan whose step failed, and free all they hold."""
        self.drop(plan)
        seqs = [item.seq for item in plan.items if item.seq.status is not Status.ENDED]
        for seq in seqs:
            self._end(seq)
        return [_last_delta(seq, FinishReason.ERROR, error) for seq in seqs]

    # Scheduling

    def _schedule_running(self, plan: Plan) -> bool:
        """Give running sequences their tokens; returns whether there are blocks enough to admit more."""
        preemptions = self.num_preemptions
        stalled = False
        for decoding in (True, False):
            # Preemption takes from the end of the list, never at or before the sequence it serves.
            for seq in self._running:
                remaining = len(seq.tokens) - seq.num_computed
                if (remaining == 1) is not decoding:
                    continue
                num_tokens = min(remaining, self.max_num_batched_tokens - plan.num_tokens)
                if num_tokens == 0:
                    return False
                if seq.num_scored < seq.num_to_score and not (num_tokens := _scorable(seq, num_tokens, plan)):
                    continue
                num_tokens = self._reserve(seq, num_tokens, plan)
                if num_tokens:
                    plan.add(seq, num_tokens)
                else:
                    stalled = True
        return not stalled and self.num_preemptions == preemptions

    def _reserve(self, seq: Sequence, num_tokens: int, plan: Plan) -> int:
        """Blocks for the next `num_tokens` tokens, or for as many as fit; preempts for the first one only.

        Returns 0 where even that one does not fit and nobody comes after `seq`: it waits with what it has.
        """
        if seq.num_computed + num_tokens <= len(seq.blocks) * BLOCK_SIZE:
            return num_tokens  # 31 of 32 decode steps
        while (room := (len(seq.blocks) + self.pool.num_free) * BLOCK_SIZE - seq.num_computed) < 1:
            victim = self._running[-1]
            if victim is seq:
                return 0
            plan.discard(victim)
            self._preempt(victim)
        num_tokens = min(num_tokens, room)
        missing = num_blocks_for(seq.num_computed + num_tokens) - len(seq.blocks)
        if missing > 0:
            seq.blocks += self.pool.allocate(missing)
        return num_tokens

    def _admit(self, plan: Plan) -> None:
        """Start waiting sequences while budget, slots and blocks last, none before those in front of it."""
        if not self._queue:
            return
        promised = sum(map(_soon_wanted, self._running))
        while plan.num_tokens < self.max_num_batched_tokens and len(self._running) < self.max_num_seqs:
            seq = self._queue.peek()
            if seq is None:
                return
            hits = self.prefix.lookup(seq.chain, seq.tokens)
            part = self.prefix.lookup_part(seq.chain, seq.tokens, len(hits))
            if seq.num_scored < seq.num_to_score:  # what is cached has no logits any more
                if _scorable(seq, 1, plan) == 0:
                    return
                hits, part = hits[: seq.num_scored // BLOCK_SIZE], None
            total = num_blocks_for(len(seq.tokens))
            needed = total - len(hits) + sum(self.pool.num_refs(block) == 0 for block in hits) + promised
            if part is not None and not self.pool.can_allocate(needed + (self.pool.num_refs(part[0]) == 0)):
                part = None  # the block that begins the same would have to stay beside its copy
            if not self.pool.can_allocate(needed):
                return
            self._queue.pop()
            self._start(seq, hits, part, plan)
            num_tokens = min(len(seq.tokens) - seq.num_computed, self.max_num_batched_tokens - plan.num_tokens)
            num_tokens = _scorable(seq, num_tokens, plan)
            plan.add(seq, self._reserve(seq, num_tokens, plan))
            promised += _soon_wanted(seq)

    def _guess(self, plan: Plan, propose: Propose) -> None:
        """Add guesses to a step in which everybody decodes, as far as rows, budget and free blocks last."""
        rows = min(ROWS, self.max_num_batched_tokens)
        if plan.num_tokens >= rows or not all(item.samples and item.num_tokens == 1 for item in plan.items):
            return  # a crowd, or prompts among them: the step has no time to spare
        for item in plan.items:
            seq = item.seq
            most = min(
                rows - plan.num_tokens,
                seq.max_len - len(seq.tokens) - 1,  # the step chooses one more
                (len(seq.blocks) + self.pool.num_free) * BLOCK_SIZE - len(seq.tokens),
            )
            if most > 0 and (draft := propose(seq, most)):
                missing = num_blocks_for(len(seq.tokens) + len(draft)) - len(seq.blocks)
                if missing > 0:
                    seq.blocks += self.pool.allocate(missing)
                plan.guess(item, draft)

    def _judge(self, seq: Sequence, num_proposed: int, num_accepted: int) -> None:
        self.num_draft_tokens += num_proposed
        self.num_accepted_tokens += num_accepted
        if seq.lookup is not None:
            seq.lookup.learn(num_proposed, num_accepted)

    def _start(self, seq: Sequence, hits: list[int], part: tuple[int, int] | None, plan: Plan) -> None:
        """Admit a sequence with the blocks that were found of its prefix, and the beginning of one more."""
        self.prefix.acquire(hits, of=(len(seq.tokens) - 1) // BLOCK_SIZE)
        seq.status = Status.RUNNING
        seq.blocks = hits
        seq.num_computed = len(hits) * BLOCK_SIZE
        seq.num_registered = len(hits)
        if part is not None:
            source, num_tokens = part
            self.pool.share(source)  # before anything is allocated, which might evict it
            target = self.pool.allocate(1)
            seq.blocks = hits + target
            seq.num_computed += num_tokens
            plan.copies.append(Copy(seq, source, target[0], num_tokens))
        seq.slot = self._free_slots.pop()
        seq.residency = self._num_admissions
        self._num_admissions += 1
        if seq.num_cached_tokens < 0:  # a recomputation's hits are not the caller's gain
            seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt)
            self.num_cached_tokens += seq.num_cached_tokens
        insort(self._running, seq, key=_key)

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        self._stop_running(seq)
        self._free(seq)
        seq.num_computed = 0
        seq.status = Status.WAITING
        self._queue.push(seq)

    def _computed(self, seq: Sequence, num_computed: int) -> None:
        """Tokens up to `num_computed` now have keys and values: offer full blocks for reuse, let siblings go."""
        if seq.num_computed < seq.num_prompt:
            self.num_prompt_tokens += min(num_computed, seq.num_prompt) - seq.num_computed
        seq.num_computed = num_computed
        full = num_computed // BLOCK_SIZE
        if full > seq.num_registered and self.prefix.enabled:
            digests = seq.chain.extend(seq.tokens, full)
            for index in range(seq.num_registered, full):
                parts = [seq.chain.part(seq.tokens, index, size) for size in PARTS]
                self.prefix.register(seq.blocks[index], digests[index], parts)
            seq.num_registered = full
        if seq.followers and num_computed >= seq.num_prompt:
            self._release_followers(seq)

    # Ends

    def _expire(self) -> None:
        if not self._deadlines:
            return
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heapq.heappop(self._deadlines)[2]
            if seq.status is not Status.ENDED:
                self._end(seq)
                self._ended.append(_last_delta(seq, FinishReason.DEADLINE))

    def _push_deadline(self, deadline: float, seq: Sequence) -> None:
        if len(self._deadlines) > 2 * len(self._live) + 16:  # mostly ended ones: sweep
            self._deadlines = [item for item in self._deadlines if item[2].status is not Status.ENDED]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline, seq.arrival, seq))

    def _end(self, seq: Sequence) -> None:
        """Take a live sequence out of everything, and free what it holds unless a step under way writes to it."""
        del self._live[seq.request.request_id]
        if seq.status is Status.WAITING:
            self._queue.remove(seq.request.request_id)
        elif seq.request.request_id in self._preparing:
            del self._preparing[seq.request.request_id]
        elif seq.status is Status.HELD:
            assert seq.leader is not None
            del seq.leader.followers[seq.request.request_id]
            seq.leader = None
        else:
            self._stop_running(seq)
            if self._in_flight is None or all(item.seq is not seq for item in self._in_flight.items):
                self._free(seq)
        seq.status = Status.ENDED
        self.num_finished += 1
        if self._leaders.get(seq.request.group_id) is seq:
            del self._leaders[seq.request.group_id]
        self._release_followers(seq)

    def _stop_running(self, seq: Sequence) -> None:
        index = bisect_left(self._running, seq.key, key=_key)
        assert self._running[index] is seq
        del self._running[index]

    def _free(self, seq: Sequence) -> None:
        # Backwards, so that a prefix outlives what follows it: a block without its parents cannot be found.
        self.pool.release(reversed(seq.blocks))
        seq.blocks = []
        self._free_slots.append(seq.slot)
        seq.slot = -1

    def _land(self, plan: Plan) -> None:
        assert plan is self._in_flight, "the plan is not the one under way"
        self._in_flight = None
        self.pool.release(copy.source for copy in plan.copies)

    # Siblings of one `n` request

    def _hold_or_queue(self, seq: Sequence) -> None:
        """Queue a new sequence, or hold it until its group's choice 0 has filled the prefix they share.

        Without a live choice 0 (it ended, or was never sent) nothing is waited for; nor where no full block is shared.
        """
        group, shares = seq.request.group_id, self.prefix.enabled and seq.num_prompt > BLOCK_SIZE
        leader = self._leaders.get(group) if group and shares else None
        if group and seq.request.choice_index == 0:
            self._leaders.setdefault(group, seq)
        elif leader is not None and leader.num_computed < leader.num_prompt:
            seq.status = Status.HELD
            seq.leader = leader
            leader.followers[seq.request.request_id] = seq
            return
        self._queue.push(seq)

    def _release_followers(self, seq: Sequence) -> None:
        for follower in seq.followers.values():
            follower.status = Status.WAITING
            follower.leader = None
            self._queue.push(follower)
        seq.followers = {}

    # Audit

    def check_integrity(self) -> None:
        """Raise AssertionError with the details if any of the books disagree. O(blocks + requests)."""
        flying = [] if self._in_flight is None else [item.seq for item in self._in_flight.items]
        ghosts = [seq for seq in flying if seq.status is Status.ENDED]  # aborted during the step
        resident = self._running + ghosts
        copied = [] if self._in_flight is None else [copy.source for copy in self._in_flight.copies]
        self.prefix.check_integrity([*(seq.blocks for seq in resident), copied])
        assert len(self._running) <= self.max_num_seqs
        assert [seq.key for seq in self._running] == sorted(seq.key for seq in self._running), "running is not in order"
        slots = sorted([*self._free_slots, *(seq.slot for seq in resident)])
        assert slots == list(range(self.max_num_seqs)), f"slots are lost or shared: {slots}"
        for seq in self._running:
            held, name = len(seq.blocks), seq.request.request_id
            assert seq.status is Status.RUNNING, f"{name} runs, but is {seq.status.value}"
            assert held <= num_blocks_for(len(seq.tokens) + ROWS), f"{name}: {held} blocks for {len(seq.tokens)} tokens"
            assert seq.num_computed <= held * BLOCK_SIZE, f"{name}: {seq.num_computed} tokens in {held} blocks"
            assert seq.num_computed < len(seq.tokens), f"{name} has nothing left to compute"
        held_back = len(self._preparing) + sum(len(seq.followers) for seq in self._live.values())
        for seq in self._live.values():
            request_id = seq.request.request_id
            places = (seq in self._running) + (request_id in self._queue)
            places += (seq.leader is not None) + (request_id in self._preparing)
            assert places == 1, f"{seq.request.request_id} ({seq.status.value}) is in {places} places"
            idle = not seq.blocks and not seq.num_computed and seq.slot < 0
            assert seq.status is Status.RUNNING or idle, f"{seq.request.request_id} waits, but still holds something"
        assert len(self._live) == len(self._running) + len(self._queue) + held_back
        for group, leader in self._leaders.items():
            assert leader.request.request_id in self._live, f"group {group} waits for a request that ended"


def _key(seq: Sequence) -> tuple[int, int]:
    return seq.key


def _scorable(seq: Sequence, num_tokens: int, plan: Plan) -> int:
    """Of the next `num_tokens` tokens, the first so many that leave the step's scored ones within MAX_SCORED."""
    room = MAX_SCORED - plan.num_scored
    if seq.num_to_score - seq.num_scored <= room:
        return num_tokens
    return min(num_tokens, seq.num_scored - seq.num_computed + room)


def _soon_wanted(seq: Sequence) -> int:
    """Blocks a running sequence lacks for the tokens it has and one block's worth more: it should not have to fight."""
    return max(0, num_blocks_for(min(len(seq.tokens) + BLOCK_SIZE, seq.max_len)) - len(seq.blocks))


def _nothing_chosen(seq: Sequence) -> TokenDelta:
    request = seq.request
    if request.grammar is None and request.sampling.allowed_token_ids is None:
        return _last_delta(seq, FinishReason.ERROR, "No token had a finite logit.")
    return _last_delta(
        seq,
        FinishReason.REFUSED,
        f"No token can follow the {seq.num_output} of the answer: the form of the answer, allowed_token_ids, bad_words "
        "and logit_bias, of those that the request has, exclude all of them together.",
    )


def _last_delta(seq: Sequence, reason: FinishReason, error: str | None = None) -> TokenDelta:
    return TokenDelta(
        request_id=seq.request.request_id,
        position=seq.num_output,
        finish_reason=reason,
        stop_token_id=seq.tokens[-1] if reason is FinishReason.STOP else None,
        num_cached_tokens=max(0, seq.num_cached_tokens),
        error=error,
    )
