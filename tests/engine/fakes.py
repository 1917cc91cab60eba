"""A program whose answer is a hash of all that a request's tokens may depend on, and that hash from first principles.

Its KV memory holds the token ids themselves. A wrong block, position, history, bias or sampling parameter therefore
changes the tokens, and a test sees it by comparing with `expected_output`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from engine.config import BLOCK_SIZE
from engine.kernels.batch import Int32, LogprobArrays, StepBatch, UInt32
from engine.kernels.validate import check_again, check_batch
from engine.models.spec import DecoderSpec, RopeSpec
from engine.request import Request, SamplingParams

VOCAB = 64
EOS = (1, 2)
MAX_LEN = 256


def make_spec(max_position: int = MAX_LEN, vocab_size: int = VOCAB) -> DecoderSpec:
    return DecoderSpec(
        family="fake",
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        intermediate_size=32,
        vocab_size=vocab_size,
        max_position=max_position,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10000.0, dim=16),
    )


class FakeProgram:
    """See the module. `fail_with` is raised by the next step; `num_computed` counts tokens over all steps."""

    isa = "fake"
    threads = 1
    num_ranks = 1

    def __init__(self, *, num_blocks: int, spec: DecoderSpec | None = None) -> None:
        self.num_blocks = num_blocks
        self.spec = spec or make_spec()
        self.fail_with: BaseException | None = None
        self.num_computed = 0
        self.batches: list[tuple[int, int]] = []  # (tokens, requests) of each step
        self.closed = False
        self._memory = np.full((num_blocks, BLOCK_SIZE), -1, np.int32)
        self._last: tuple[StepBatch, list[list[int]]] | None = None  # and the context of each row

    def step(self, batch: StepBatch) -> Int32:
        check_batch(self.spec, batch, self.num_blocks, previous_rows=0)
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        self.num_computed += len(batch.token_ids)
        self.batches.append((len(batch.token_ids), len(batch.seq_lens)))
        owners = np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_starts))
        tables = batch.block_tables[0]
        blocks = tables[owners, batch.positions // BLOCK_SIZE]
        slots = list(zip(blocks.tolist(), (batch.positions % BLOCK_SIZE).tolist(), strict=True))
        assert len(set(slots)) == len(slots), "two tokens of one step share a KV slot"
        self._memory[blocks, batch.positions % BLOCK_SIZE] = batch.token_ids
        chosen = []
        contexts: list[list[int]] = []
        self._last = batch, contexts
        for row, index in enumerate(batch.logits_rows.tolist()):
            position = int(batch.positions[index])
            table = tables[owners[index], : position // BLOCK_SIZE + 1]
            context = self._memory[table].reshape(-1)[: position + 1].tolist()
            contexts.append(context)
            given = -1 if batch.logprobs is None else int(batch.logprobs.targets[row])
            chosen.append(given if given >= 0 else self._sample(batch, row, context))
            if batch.logprobs is not None and batch.logprobs.counts[row] >= 0:
                score(batch.logprobs, row, context, chosen[-1])
        return np.array(chosen, np.int32)

    def choose_again(self, row: int, mask: UInt32) -> int:
        assert self._last is not None
        batch, contexts = self._last
        check_again(batch.sampling, row, mask, self.spec.vocab_size)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=self.spec.vocab_size)
        token = self._sample(batch, row, contexts[row], np.flatnonzero(bits == 0).tolist()) if bits.any() else -1
        if batch.logprobs is not None and batch.logprobs.counts[row] >= 0:
            score(batch.logprobs, row, contexts[row], token)
        return token

    def _sample(self, batch: StepBatch, row: int, context: list[int], forbidden: Sequence[int] = ()) -> int:
        s = batch.sampling
        assert s is not None
        start, end = s.history_starts[row : row + 2].tolist()
        output = int(s.history_output_starts[row])
        b0, b1 = s.bias_starts[row : row + 2].tolist()
        bias: dict[int, float] = {}
        for token, value in zip(s.bias_tokens[b0:b1].tolist(), s.bias_values[b0:b1].tolist(), strict=True):
            bias[token] = bias.get(token, 0.0) + value
        bias |= dict.fromkeys(forbidden, -np.inf)
        numbers = (
            *(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty),
            *(s.presence_penalty, s.frequency_penalty, s.seed, s.choice, s.position),
        )
        return _choose(
            context,
            [array[row].item() for array in numbers],
            (s.history_tokens[start:output].tolist(), s.history_tokens[output:end].tolist()),
            bias,
            self.spec.vocab_size,
        )

    def copy_blocks(self, pairs: Int32) -> None:
        self._memory[pairs[:, 1]] = self._memory[pairs[:, 0]]

    def close(self) -> None:
        self.closed = True


def score(wanted: LogprobArrays, row: int, context: list[int], token: int) -> None:
    """Log-probabilities of a row: a hash of all they may depend on."""
    wanted.tokens[row] = [token, *range(wanted.tokens.shape[1] - 1)]
    wanted.logprobs[row] = [expected_logprob(context, each) for each in wanted.tokens[row].tolist()]
    wanted.ranks[row] = 1 + token


def expected_logprob(context: list[int], token: int) -> float:
    digest = hashlib.sha256(repr((context, token)).encode()).digest()
    return -(int.from_bytes(digest[:2], "little") / 1024)


def expected_output(
    request: Request, *, eos: tuple[int, ...] = EOS, max_len: int = MAX_LEN, vocab: int = VOCAB
) -> list[int]:
    """Every output token of a request that is left alone, computed without any engine."""
    sampling = request.sampling
    prompt, output = request.prompt_token_ids, list(request.output_token_ids)
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}
    limit = min(max_len - len(prompt), sampling.max_tokens or max_len)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    penalized = penalties != (1.0, 0.0, 0.0)
    while len(output) < limit:
        if len(output) > sampling.min_tokens and output[-1] in stops:
            break
        early = len(output) < sampling.min_tokens
        forbidden = set(stops) if early else set()
        if sampling.allowed_token_ids is not None:
            forbidden |= {*range(vocab)} - {*sampling.allowed_token_ids}
        for word in map(list, sampling.bad_words):
            if output[len(output) - len(word) + 1 :] == word[:-1] or len(word) == 1:
                forbidden.add(word[-1])
        bias = sampling.logit_bias | dict.fromkeys(forbidden, -np.inf)
        floats = [float(np.float32(value)) for value in (sampling.top_p, sampling.min_p, *penalties)]
        numbers = [float(np.float32(sampling.temperature)), sampling.top_k, *floats]
        output.append(
            _choose(
                prompt + output,
                [*numbers, request.seed, request.choice_index, len(prompt) + len(output)],
                (prompt, output) if penalized else ([], []),
                bias,
                vocab,
            )
        )
    return output


def _choose(
    context: list[int],
    numbers: list[float],
    history: tuple[list[int], list[int]],
    bias: dict[int, float],
    vocab: int,
) -> int:
    what = repr((context, numbers, history, sorted(bias.items()))).encode()
    draw = int.from_bytes(hashlib.blake2b(what, digest_size=8).digest(), "little")
    allowed = [token for token in range(vocab) if bias.get(token) != -np.inf]
    return allowed[draw % len(allowed)]


def make_request(
    request_id: str,
    prompt: Iterable[int],
    *,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    output_token_ids: Iterable[int] = (),
    choice_index: int = 0,
    group_id: str = "",
    priority: int = 0,
    tenant: str = "",
    deadline: float | None = None,
    cache_salt: str = "",
) -> Request:
    return Request(
        request_id=request_id,
        model="fake",
        prompt_token_ids=list(prompt),
        sampling=sampling or SamplingParams(max_tokens=8),
        seed=seed,
        output_token_ids=list(output_token_ids),
        choice_index=choice_index,
        group_id=group_id,
        priority=priority,
        tenant=tenant,
        deadline=deadline,
        cache_salt=cache_salt,
    )
