"""Scheduler and runner under random traffic, over a program whose KV memory shows every mistake."""

from __future__ import annotations

import functools
import random

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import BLOCK_SIZE
from engine.request import FinishReason, Request, SamplingParams, TokenDelta, TokenLogprobs
from engine.scheduler.lookup import ROWS
from engine.scheduler.plan import Plan
from engine.scheduler.scheduler import MAX_SCORED, Scheduler
from engine.scheduler.sequence import Sequence
from engine.worker.runner import Runner
from tests.engine.fakes import EOS, MAX_LEN, VOCAB, FakeProgram, expected_logprob, expected_output, make_request

tokens = st.integers(0, VOCAB - 1)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(4, 90),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([0.9, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, 1.5]), max_size=2),
    stop_token_ids=st.sets(tokens, max_size=1).map(tuple),
    ignore_eos=st.booleans(),
    # Few tokens, so that bad words of several would come about all the time.
    allowed_token_ids=st.sampled_from([None, None, (0, 4, 5, 6)]),
    bad_words=st.lists(st.lists(st.sampled_from([4, 5, 6]), min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, 0, 2]),
)
# A few common beginnings, so that prefixes are shared.
prompts = st.builds(
    lambda first, shared, rest: [first] * shared + rest,
    tokens.map(lambda token: token % 3),
    st.sampled_from([0, 31, 32, 33, 64, 100]),
    st.lists(tokens, min_size=1, max_size=60) | tokens.map(lambda token: [token % 3] * 32),
)


def scores(token_ids: list[int], start: int, count: int) -> list[TokenLogprobs]:
    """What the fake program says of the tokens from `start` on."""
    return [
        TokenLogprobs(
            token,
            expected_logprob(token_ids[:i], token),
            1 + token,
            [(each, expected_logprob(token_ids[:i], each)) for each in range(count)],
        )
        for i, token in enumerate(token_ids[start:], start)
    ]


class Traffic(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(MAX_LEN // BLOCK_SIZE, 24),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.sampled_from([0, 10, 58, 250]),
        caching=st.booleans(),
        errs=st.none() | st.sampled_from([0.0, 0.3, 1.0]),
    )
    def start(self, num_blocks: int, max_num_seqs: int, extra_budget: int, caching: bool, errs: float | None) -> None:
        self.now = 0.0
        self.rng = random.Random(num_blocks)
        self.budget = max_num_seqs + extra_budget
        self.program = FakeProgram(num_blocks=num_blocks)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            max_model_len=MAX_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            enable_prefix_caching=caching,
            propose=None if errs is None else functools.partial(self._propose, errs),
            eos_token_ids=EOS,
            clock=lambda: self.now,
        )
        self.runner = Runner(
            self.program,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=MAX_LEN,
            vocab_size=VOCAB,
        )
        self.plan: Plan | None = None
        self.expected: dict[str, list[int]] = {}  # of live requests
        self.received: dict[str, list[int]] = {}
        self.unscored: dict[str, Request] = {}  # whose prompt's log-probabilities are still to come
        self.requests: dict[str, Request] = {}
        self.count = 0

    def _propose(self, errs: float, seq: Sequence, most: int) -> list[int]:
        """What the sequence will say, but for a token now and then; at times more than it will say."""
        whole = self.expected.get(seq.request.request_id, [])
        right = [*whole[seq.num_output :], 0, 0, 0][: self.rng.randint(0, most)]
        return [self.rng.randrange(VOCAB) if self.rng.random() < errs else token for token in right]

    @rule(
        prompt=prompts,
        sampling=samplings,
        priority=st.integers(0, 2),
        lifetime=st.none() | st.integers(1, 60),
        num_choices=st.integers(1, 3),
        num_resumed=st.sampled_from([0, 0, 0, 1, 40]),
        tenant=st.sampled_from(["", "t"]),
    )
    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        priority: int,
        lifetime: int | None,
        num_choices: int,
        num_resumed: int,
        tenant: str,
    ) -> None:
        group = f"g{self.count}"
        for choice in range(num_choices):
            request = make_request(
                f"r{self.count}",
                prompt,
                sampling=sampling,
                seed=self.count % 2,
                choice_index=choice,
                group_id=group if num_choices > 1 else "",
                priority=priority,
                deadline=None if lifetime is None else self.now + lifetime,
                tenant=tenant,
            )
            self.count += 1
            self._add(request, num_resumed)

    def _add(self, request: Request, num_resumed: int) -> None:
        whole = expected_output(request)
        resumed = msgspec.structs.replace(request, output_token_ids=whole[:num_resumed])
        self.scheduler.add(resumed)
        self.expected[request.request_id] = whole
        self.received[request.request_id] = whole[:num_resumed]
        self.requests[request.request_id] = request
        if request.sampling.prompt_logprobs is not None and not resumed.output_token_ids:
            self.unscored[request.request_id] = request

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.expected)))
        self.scheduler.abort(request_id)
        del self.expected[request_id]

    @rule()
    def abort_unknown(self) -> None:
        assert not self.scheduler.abort("nobody")

    @precondition(lambda self: self.plan is None)
    @rule()
    def schedule(self) -> None:
        self.now += 1.0
        plan = self.scheduler.schedule()
        self._receive(plan.ended)
        if not plan.items:
            assert not self.scheduler.has_work, "work, but nothing is scheduled"
            return
        assert plan.num_scored == sum(item.num_scored for item in plan.items) <= MAX_SCORED
        assert plan.num_tokens == sum(item.num_tokens for item in plan.items) <= self.budget
        assert len({item.seq.slot for item in plan.items}) == len(plan.items)
        assert all(item.num_tokens > 0 for item in plan.items)
        self.plan = plan

    @precondition(lambda self: self.plan is not None)
    @rule()
    def update(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self._receive(self.scheduler.update(plan, self.runner.run(plan)))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def drop(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self.scheduler.drop(plan)

    @precondition(lambda self: self.plan is not None and len(self.plan.items) < 3)
    @rule()
    def fail(self) -> None:
        assert self.plan is not None
        plan, self.plan = self.plan, None
        self._receive(self.scheduler.fail(plan, "failed on purpose"))

    @precondition(lambda self: self.plan is None)
    @rule(count=st.integers(1, 40))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.schedule()
            if self.plan is None:
                return
            self.books_balance()
            self.update()

    def _receive(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            whole, so_far = self.expected[delta.request_id], self.received[delta.request_id]
            assert delta.position == len(so_far)
            self._check_logprobs(delta)
            so_far += delta.token_ids
            assert so_far == whole[: len(so_far)], f"{delta.request_id} got tokens that are not its own"
            if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert so_far == whole
                assert (delta.stop_token_id is not None) == (delta.finish_reason is FinishReason.STOP)
            if delta.finish_reason is not None:
                del self.expected[delta.request_id]

    def _check_logprobs(self, delta: TokenDelta) -> None:
        request = self.requests[delta.request_id]
        prompt, sampling = request.prompt_token_ids, request.sampling
        if delta.token_ids and (sampling.logprobs is not None):
            context = prompt + self.received[delta.request_id]
            assert delta.logprobs == scores(context + delta.token_ids, len(context), sampling.logprobs)
        else:
            assert not delta.logprobs
        if delta.token_ids and self.unscored.pop(delta.request_id, None) is not None:
            assert delta.prompt_logprobs == scores(prompt, 1, sampling.prompt_logprobs or 0)
        else:
            assert not delta.prompt_logprobs

    @invariant()
    def books_balance(self) -> None:
        self.scheduler.check_integrity()
        assert self.scheduler.num_running + self.scheduler.num_waiting <= len(self.expected)
        for item in [] if self.plan is None else self.plan.items:
            assert len(item.seq.blocks) <= -(-(len(item.seq.tokens) + ROWS) // BLOCK_SIZE)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.plan is not None:
            self.update()
        for _ in range(20_000):
            if not self.scheduler.has_work:
                break
            self.schedule()
            if self.plan is not None:
                self.update()
        assert not self.expected, f"never ended: {sorted(self.expected)}"
        self.scheduler.check_integrity()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks, "blocks leaked"
        assert not self.scheduler._leaders, "groups leaked"


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
