"""One live request as the scheduler sees it."""

from __future__ import annotations

import enum

from engine.cache.prefix import HashChain, root_digest
from engine.request import FinishReason, Request, TokenLogprobs
from engine.scheduler.lookup import PromptLookup


class Status(enum.Enum):
    WAITING = "waiting"  # in the queue; holds no block
    HELD = "held"  # waits for its grammar, or for its group's choice 0 to compute their common prefix; holds no block
    RUNNING = "running"  # holds blocks and a slot
    ENDED = "ended"


class Sequence:
    """Tokens and blocks of one request.

        tokens   |------- prompt -------|---- output ----|
        KV       |------ num_computed ------|   the rest is computed in coming steps
        blocks   |    |    |    |    |    |    |    cover num_computed and the tokens of the step being run

    A step that computes up to the last token chooses the next one. Preemption only forgets KV: tokens stay.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "chain",
        "ends",
        "followers",
        "leader",
        "lookup",
        "max_len",
        "num_cached_tokens",
        "num_computed",
        "num_prompt",
        "num_registered",
        "num_scored",
        "num_to_score",
        "prompt_logprobs",
        "request",
        "residency",
        "slot",
        "status",
        "stop_token_ids",
        "tokens",
    )

    def __init__(self, request: Request, *, arrival: int, eos_token_ids: tuple[int, ...], max_model_len: int) -> None:
        sampling = request.sampling
        self.request = request
        self.arrival = arrival
        self.status = Status.WAITING
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.max_len = max_model_len  # tokens at which it ends with LENGTH
        if sampling.max_tokens is not None:
            self.max_len = min(max_model_len, self.num_prompt + sampling.max_tokens)
        eos = () if sampling.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset((*eos, *sampling.stop_token_ids))
        # With a grammar these end the answer at once: they are allowed before min_tokens only where nothing else is.
        self.ends = frozenset(eos_token_ids if request.grammar is not None else ())

        self.num_computed = 0  # tokens whose keys and values lie in `blocks`
        self.num_registered = 0  # full blocks that were offered to the prefix cache
        self.blocks: list[int] = []  # while running it only grows, so that the runner can copy what is new
        self.slot = -1  # row of the runner's tables while running
        self.residency = -1  # unique to each stay in a slot
        self.num_cached_tokens = -1  # prompt tokens found in the prefix cache on first admission; -1: not yet admitted
        # Tokens from the prompt's first on after which the next one's log-probability is known. A request resumed after
        # its first token has delivered them all.
        self.num_to_score = self.num_prompt - 1  # prompt tokens that another one follows
        wants = sampling.prompt_logprobs is not None and not request.output_token_ids
        self.num_scored = 0 if wants else self.num_to_score
        self.prompt_logprobs: list[TokenLogprobs] = []  # for the next delta
        self.chain = HashChain(root_digest(salt=request.cache_salt, tenant=request.tenant, adapter=request.adapter))
        self.lookup: PromptLookup | None = None  # from its first guess on
        self.leader: Sequence | None = None  # while HELD: the sequence it waits for, or None for its grammar
        self.followers: dict[str, Sequence] = {}  # siblings HELD for this one

    @property
    def key(self) -> tuple[int, int]:
        """Who goes first: the smaller."""
        return (self.request.priority, self.arrival)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may follow, from the sequence's own text."""
        if self.lookup is None:
            self.lookup = PromptLookup()
        return self.lookup.propose(self.tokens, most)

    def finish_reason(self) -> FinishReason | None:
        """Why no further token may be chosen, judged by the tokens alone; None where one may.

        Before min_tokens a stop token cannot be chosen (the runner forbids it), so one found there ends nothing.
        """
        output, last = self.num_output, self.tokens[-1]
        if last in self.stop_token_ids and (output > self.request.sampling.min_tokens or last in self.ends):
            return FinishReason.STOP
        if len(self.tokens) >= self.max_len:
            return FinishReason.LENGTH
        return None
