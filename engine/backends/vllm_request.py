"""Requests as vLLM takes them, and its answers as ours. The only place that knows how either is spelled by both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.request import FinishReason, Request, TokenDelta, TokenLogprobs

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
}


def prompt_of(request: Request, said: Sequence[int]) -> Any:
    """The prompt with what the request has said already: vLLM knows no answer that was begun elsewhere.

    It is what vLLM's own server makes of a prompt; any other would go through a thread that may have to tokenize it.
    """
    from vllm.inputs import tokens_input

    return tokens_input([*request.prompt_token_ids, *said], cache_salt=request.cache_salt or None)


def sampling_of(request: Request, said: Sequence[int], eos_token_ids: Sequence[int]) -> SamplingParams:
    """How to go on after `said`. Texts are the server's, so vLLM makes none and looks for no stop strings.

    What ends an answer is told as stop tokens, since a checkpoint's own list may be shorter than ours. After a restart
    presence and frequency penalties count from there, for what was said has become prompt.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    sampling = request.sampling
    stops = [] if sampling.ignore_eos else list(eos_token_ids)
    most = sampling.max_tokens
    params = SamplingParams(
        # Whoever asks for no token wants its prompt scored: the one that is computed then is not delivered.
        max_tokens=None if most is None else max(1, most - len(said)),
        min_tokens=max(0, sampling.min_tokens - len(said)),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        allowed_token_ids=None if sampling.allowed_token_ids is None else list(sampling.allowed_token_ids),
        stop_token_ids=sorted({*stops, *sampling.stop_token_ids}),
        ignore_eos=True,
        logprobs=sampling.logprobs,
        prompt_logprobs=None if said else sampling.prompt_logprobs,
        seed=seed_of(request, len(said)),
        structured_outputs=None
        if request.grammar is None
        else StructuredOutputsParams(grammar=as_lark(request.grammar)),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )
    if sampling.bad_words:  # vLLM's own field holds texts, which it would tokenize
        params._bad_words_token_ids = [list(word) for word in sampling.bad_words]
    return params


def seed_of(request: Request, position: int) -> int | None:
    """Of vLLM's generator, which draws one number after another: another one for each choice and each new start.

    None where the caller gave none: a row with a seed is drawn by itself, which vLLM does for all others at once.
    """
    if request.any_seed or request.sampling.temperature == 0:
        return None
    told = f"{request.seed}:{request.choice_index}:{position}".encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 1


def as_lark(grammar: str) -> str:
    """A Request.grammar in one Lark grammar, the only form in which vLLM takes any of them."""
    main, *parts = json.loads(grammar)["grammars"]
    text: str = main["lark_grammar"] if "lark_grammar" in main else f"start: {_json(main)}"
    for part in sorted(parts, key=lambda each: -len(each["name"])):  # t10 before t1
        text = text.replace(f"@{part['name']}", part["name"])
    return "\n".join([text.rstrip("\n"), *(f"{part['name']}: {_json(part)}" for part in parts)]) + "\n"


def _json(part: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(part["json_schema"], ensure_ascii=False)


def delta_of(request: Request, output: RequestOutput, position: int) -> TokenDelta:
    """What vLLM says of a request; `position` is that of its first new token among the output."""
    (choice,) = output.outputs
    token_ids = list(choice.token_ids)
    sampling = request.sampling
    reason = None if choice.finish_reason is None else _REASONS.get(choice.finish_reason, FinishReason.ERROR)
    logprobs = choice.logprobs or []
    if sampling.max_tokens == 0:
        token_ids, logprobs = [], []
        reason = None if reason is None else FinishReason.LENGTH
    return TokenDelta(
        request_id=request.request_id,
        position=position,
        token_ids=token_ids,
        logprobs=[]
        if sampling.logprobs is None
        else [_logprobs(token, found, sampling.logprobs) for token, found in zip(token_ids, logprobs, strict=True)],
        prompt_logprobs=_of_prompt(request, output.prompt_logprobs),
        finish_reason=reason,
        stop_token_id=token_ids[-1] if reason is FinishReason.STOP else None,
        num_cached_tokens=output.num_cached_tokens or 0,
        error=f"vLLM ended the request: {choice.finish_reason}." if reason is FinishReason.ERROR else None,
    )


def _of_prompt(request: Request, found: Sequence[Mapping[int, Any] | None] | None) -> list[TokenLogprobs]:
    wanted = request.sampling.prompt_logprobs
    if wanted is None or not found:
        return []
    return [
        _logprobs(token, each, wanted)
        for token, each in zip(request.prompt_token_ids[1:], found[1:], strict=True)
        if each is not None
    ]


def _logprobs(token: int, found: Mapping[int, Any], wanted: int) -> TokenLogprobs:
    own = found[token]
    best = sorted(((each.rank, other) for other, each in found.items() if each.rank and each.rank <= wanted))
    # A token that ties with the last of the best ones has a rank among them, too.
    return TokenLogprobs(
        token, own.logprob, own.rank or 0, [(other, found[other].logprob) for _, other in best[:wanted]]
    )
