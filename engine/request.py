"""What crosses the engine's boundary: requests in, token deltas out.

These structures travel between processes as msgpack, so they hold plain data only.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.errors import RequestError, SeraphError


class FinishReason(str, enum.Enum):
    """Why a request ended."""

    STOP = "stop"  # an end-of-turn token, a stop token id or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # the caller went away
    DEADLINE = "deadline"  # the request's deadline passed first
    REFUSED = "refused"  # its own limits on tokens leave nothing to go on with; TokenDelta.error says how
    ERROR = "error"  # the engine failed it; TokenDelta.error says how

    @classmethod
    def after(cls, error: SeraphError) -> FinishReason:
        """How a request ends that ran into an error."""
        return cls.REFUSED if isinstance(error, RequestError) else cls.ERROR


MAX_LOGPROBS = 20
"""Most of the best tokens whose log-probabilities may be asked for beside the token's own."""
IGNORE_EOS_REASON = "ignore_eos cannot be true where the form of the answer is given: its end could not be told."

_COUNTS = frozenset({"max_tokens", "min_tokens", "top_k"})

MAX_BAD_WORDS = 512
MAX_BAD_WORD_TOKENS = 1024
MAX_ALLOWED_TOKENS = 4096


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form of an answer: exactly one of the first five. The names are vLLM's.

    Applied as a grammar (Request.grammar), which whoever makes a request has compiled first.
    """

    json: str | dict[str, Any] | None = None  # a JSON schema
    json_object: bool = False  # any JSON object
    regex: str | None = None
    choice: tuple[str, ...] | None = None  # one of these texts
    grammar: str | None = None  # context-free, as Lark or GBNF write it
    disable_any_whitespace: bool = False  # JSON on one line, without a space

    @property
    def is_json(self) -> bool:
        """Whether answers are JSON."""
        return self.json_object or self.json is not None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to stop.

    `stop` strings, and what is shown of tokens, are applied where text is made (server, LLM), never in the engine
    process; everything else is applied by the engine. Repetition penalty counts prompt and output, presence and
    frequency count output only, and so do bad words.
    """

    max_tokens: int | None = None  # None: until the context is full; 0: the prompt is computed, and nothing chosen
    min_tokens: int = 0  # end-of-turn, stop tokens and stop strings wait until this many were produced
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that the output may not hold (ModelText.bad_words)
    allowed_token_ids: tuple[int, ...] | None = None  # None: every token
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False  # the text of what ended the answer is shown, too
    skip_special_tokens: bool = True  # special tokens are no part of the text
    logprobs: int | None = None  # with each token its log-probability and those of so many of the best; None: without
    prompt_logprobs: int | None = None  # the same of each prompt token that has one before it
    structured_outputs: StructuredOutputs | None = None  # an engine reads Request.grammar, made of it

    @classmethod
    def from_defaults(cls, values: Mapping[str, float]) -> SamplingParams:
        """From numbers by name, as `ModelInfo.generation_defaults` holds them. Raises RequestError as `validate`."""
        fields: dict[str, Any] = {name: int(value) if name in _COUNTS else value for name, value in values.items()}
        sampling = cls(**fields)
        sampling.validate()
        return sampling

    def validate(self) -> None:
        """Raise RequestError, naming the field, on the first value outside its range."""

        def need(ok: bool, param: str, allowed: str) -> None:
            if not ok:
                raise RequestError(f"{param} must be {allowed}, got {getattr(self, param)!r}.", param=param)

        # Comparisons are written so that NaN fails them.
        need(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "at least 0")
        need(self.min_tokens >= 0, "min_tokens", "at least 0")
        need(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        need(0.0 <= self.temperature <= 2.0, "temperature", "between 0 and 2")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        need(self.top_k >= -1, "top_k", "-1 or 0 (off) or a positive count")
        need(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        need(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "above 0 and at most 10")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            need(count is None or 0 <= count <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")
        if self.structured_outputs is not None and self.ignore_eos:
            raise RequestError(IGNORE_EOS_REASON, param="ignore_eos")
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias values must be between -100 and 100, got {bias!r} for token {token_id}.",
                    param="logit_bias",
                )
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise RequestError(
                f"bad_words must be at most {MAX_BAD_WORDS} token sequences, got {len(self.bad_words)}.",
                param="bad_words",
            )
        for word in self.bad_words:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise RequestError(
                    f"bad_words must have 1 to {MAX_BAD_WORD_TOKENS} tokens each, got {len(word)}.", param="bad_words"
                )
        if self.allowed_token_ids is not None and not 1 <= len(self.allowed_token_ids) <= MAX_ALLOWED_TOKENS:
            raise RequestError(
                f"allowed_token_ids must be 1 to {MAX_ALLOWED_TOKENS} token ids, got {len(self.allowed_token_ids)}.",
                param="allowed_token_ids",
            )


def need_a_choice(sampling: SamplingParams, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
    """Raise RequestError unless one token at least is allowed whatever was written before.

    Such a token is no bad word's last one and, where an answer may not end at once, ends none.
    """
    never = {word[-1] for word in sampling.bad_words}
    if sampling.min_tokens:
        never |= {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)}
    allowed = range(vocab_size) if sampling.allowed_token_ids is None else sampling.allowed_token_ids
    if all(token in never for token in allowed):
        param = "bad_words" if sampling.allowed_token_ids is None else "allowed_token_ids"
        raise RequestError(f"{param}: bad_words and min_tokens may leave no token that is allowed.", param=param)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to continue: everything the engine needs, and everything a replay after a crash needs.

    A resumed request carries what was already produced in `output_token_ids`, apart from the prompt: penalties,
    min_tokens and max_tokens count it as output. Randomness is keyed by (seed, choice_index, absolute position).
    """

    request_id: str  # unique among live requests
    model: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int  # 0 <= seed < 2**64, always concrete: the server draws one where the caller gave none
    any_seed: bool = False  # the caller gave none: an engine that pays for seeds may draw otherwise
    output_token_ids: list[int] = []
    choice_index: int = 0
    group_id: str = ""  # siblings of one `n` request share it; choice 0 fills their common prefix
    adapter: str | None = None
    priority: int = 0  # lower runs first, as in vLLM
    tenant: str = ""
    deadline: float | None = None  # Unix time, seconds
    cache_salt: str = ""  # prefix-cache blocks are shared only between equal salts
    grammar: str | None = None  # as engine.sampling.grammar compiles it: which tokens may follow which
    pooling: str | None = None
    trace: str = ""  # what log lines about it carry: the id of the HTTP request it came with


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """A token and how likely the model itself held it and others in its place: natural logarithms of the softmax of raw
    logits, before penalties, bias, masks, temperature and selections. -inf, with rank 0, where a logit was not finite.
    """

    token_id: int
    logprob: float
    rank: int  # 1 for the most likely
    top: list[tuple[int, float]] = []  # the most likely ones and theirs, as many as were asked for, the best first


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Zero to k new tokens of one request."""

    request_id: str
    position: int  # index, among the output tokens, of token_ids[0]
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []  # one for each of token_ids, where SamplingParams.logprobs asks for them
    # Of the prompt's second token to its last, all at once in the first delta: a request that is resumed after its
    # first token has brought them.
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the token that ended the request (it is the last of token_ids)
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache
    error: str | None = None


class TextInput(msgspec.Struct, frozen=True, omit_defaults=True):
    """A whole text for an encoder, or two that it looks at together."""

    token_ids: list[int]  # with the tokens that the model wants around and between texts
    second: int | None = None  # index of the first token of a second text, where its tokens are of another type


class EmbedRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Texts to be made vectors: embeddings, or the logits of a classifier."""

    request_id: str  # unique among live requests of either kind
    model: str
    inputs: list[TextInput]
    priority: int = 0  # lower runs first
    trace: str = ""  # as Request.trace


class Embedded(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of an EmbedRequest."""

    request_id: str
    data: bytes = b""  # float32 [inputs, output size], little-endian
    error: str | None = None  # how the engine failed it


class WeightsInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The weights as the engine holds them."""

    nbytes: int = 0
    bits: int = 0  # of most of them: 4 or 8 where they are quantized, 16 for bfloat16


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's encoder can do."""

    model: str
    output_size: int  # numbers of a text's vector
    max_input_len: int  # tokens of a text, special ones included
    vocab_size: int
    num_labels: int = 0  # of a classifier, whose vectors are logits; 0: they are embeddings
    checkpoint_format: str = ""
    num_parameters: int = 0
    weights: WeightsInfo = WeightsInfo()


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine and its model can do."""

    engine: str  # "native" or "vllm"
    version: str = ""  # of another engine's software, and on what it computes
    model: str
    max_model_len: int
    vocab_size: int
    features: frozenset[str] = frozenset()  # names of engine.features
    isa: str = ""  # kernel build in use; empty where the engine has no such choice, as in the fields below
    threads: int = 0
    num_ranks: int = 0  # tensor-parallel ranks that the threads form
    max_position: int = 0  # tokens of context the model was made for
    max_num_seqs: int = 0
    checkpoint_format: str = ""  # what the checkpoint stores, as "Q4_1 GGUF"
    checkpoint_sha256: str = ""  # of the bytes that the weights were made from
    num_parameters: int = 0
    weights: WeightsInfo = WeightsInfo()
    num_kv_blocks: int = 0
    kv_cache_tokens: int = 0
    kv_cache_bytes: int = 0
    kv_cache_dtype: str = ""
    encoder: EncoderInfo | None = None  # beside the decoder, or instead of one


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot of the engine; counters only grow during the life of one engine process."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # reusable now: never used, or cached and unreferenced
    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed, cached ones not among them
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_tokens: int = 0  # guessed to follow, and computed
    num_accepted_tokens: int = 0  # of them, those that were chosen
    num_preemptions: int = 0
    num_masks: int = 0  # of grammars, one for each token that they refused
    grammar_seconds: float = 0.0  # of a processor, for checks and masks
    num_requests_finished: int = 0
    step_seconds: float = 0.0  # total time inside kernels
    num_encoded_texts: int = 0
    num_encoded_tokens: int = 0
    encoder_seconds: float = 0.0  # total time inside the encoder's kernels
    num_restarts: int = 0  # of the engine process
