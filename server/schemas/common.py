"""What chat and plain completions share: the sampling fields of a request, usage, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import msgspec
from pydantic import BaseModel, BeforeValidator, Field

from engine.errors import RequestError
from engine.request import MAX_ALLOWED_TOKENS, MAX_LOGPROBS, SamplingParams
from server.schemas.body import Body
from server.schemas.fields import STREAM_OPTION_FIELDS, Inspection, Table, inspect
from server.schemas.structured import StructuredBody

MAX_CHOICES = 128
"""Most answers to one HTTP request: `n` times its number of prompts."""

MAX_STOPS = 16
"""Most stop strings; the OpenAI API takes 4."""

MAX_STOP_LENGTH = 1024
"""Longest stop string, in characters: text is held back while it could still become one."""

MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024

MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 64
"""Characters; all of them are tokenized, in every way that they can be written."""

SEED_SPACE = 1 << 64


def _stops(value: Any) -> Any:
    """A single stop string is a list of one; empty ones ask for nothing, as some clients send them."""
    if isinstance(value, str):
        value = [value]
    return [stop for stop in value if stop != ""] if isinstance(value, list) else value


def _bias_keys(value: Any) -> Any:
    """JSON object keys are text; anything but a plain decimal stays as it is, to be refused by its type."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key: bias for key, bias in value.items()}


BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
StopString = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
StopList = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
Stops = Annotated[StopList | None, BeforeValidator(_stops)]
BiasMap = Annotated[dict[int, float], Field(max_length=MAX_LOGIT_BIAS)]
LogitBias = Annotated[BiasMap | None, BeforeValidator(_bias_keys)]


class StreamOptions(Body):
    """What a stream reports beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RequestBody(Body):
    """The whole body of a request, every name of which stands in a table."""

    fields: ClassVar[Table]

    def inspect(self) -> Inspection:
        """Class every name of the body; raises RequestError on refused ones and on fields that do not go together."""
        return inspect(self.fields, self.model_extra or {})


class GenerationBody(RequestBody, StructuredBody):
    """The fields that chat and plain completions share. Null means the default throughout."""

    model: str = Field(min_length=1, description="A model id, as /v1/models lists it.")
    temperature: float | None = Field(None, description="0 to 2; 0 always takes the best token.")
    top_p: float | None = Field(None, description="Above 0, at most 1.")
    top_k: int | None = Field(None, description="0 or -1: off.")
    min_p: float | None = Field(None, description="0 to 1; 0: off.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Number of answers.")
    seed: int | None = Field(None, description="Any whole number; taken modulo 2^64.")
    stop: Stops = Field(None, description="Up to 16 texts that end the answer and are not part of it.")
    stop_token_ids: list[int] | None = Field(
        None, max_length=MAX_STOP_TOKEN_IDS, description="Tokens that end the answer and are not part of its text."
    )
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer, cut to what the context leaves.")
    min_tokens: int | None = Field(None, ge=0, description="Nothing ends the answer before.")
    ignore_eos: bool | None = Field(None, description="Write on after the model's end of turn.")
    presence_penalty: float | None = Field(None, description="-2 to 2, of tokens that the answer has.")
    frequency_penalty: float | None = Field(None, description="-2 to 2, for each time that the answer has a token.")
    repetition_penalty: float | None = Field(None, description="Above 0, at most 10; of prompt and answer. 1: off.")
    logit_bias: LogitBias = Field(None, description="-100 to 100 for token ids.")
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="With the prompt's tokens how likely they were, and so many others."
    )
    return_token_ids: bool | None = Field(None, description="Token ids of the prompt and of the answer beside text.")
    return_tokens_as_token_ids: bool | None = Field(
        None, description="Log-probabilities name tokens as token_id:7 instead of by their text."
    )
    bad_words: list[BadWord] | None = Field(
        None, max_length=MAX_BAD_WORDS, description="Texts that the answer may not hold, as tokens write them."
    )
    allowed_token_ids: list[int] | None = Field(
        None, min_length=1, max_length=MAX_ALLOWED_TOKENS, description="The only tokens that may be chosen."
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="Show the stop text, or stop token, that ended the answer."
    )
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text; by default yes.")
    truncate_prompt_tokens: int | None = Field(
        None,
        description="Keep only so many of the prompt's tokens, its last ones; -1: as many as fit beside max_tokens.",
    )
    priority: int | None = Field(None, ge=-(1 << 31), lt=1 << 31, description="Lower runs first.")
    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Prompts are shared in the cache among equal salts only."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None

    def inspect(self) -> Inspection:
        found = super().inspect()
        if self.stream_options is not None:
            if not self.stream and (self.stream_options.include_usage or self.stream_options.continuous_usage_stats):
                raise RequestError("stream_options asks for usage in a stream: stream must be true.", param="stream")
            found += inspect(STREAM_OPTION_FIELDS, self.stream_options.model_extra or {}, "stream_options.")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs are not part of streams: leave stream out.", param="prompt_logprobs")
        return found + self.inspect_form(ignore_eos=bool(self.ignore_eos))

    @property
    def num_choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens whose log-probabilities each token of an answer gets; None: without, its own neither."""
        return None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return self.prompt_logprobs

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def truncated(self, prompt: Sequence[int], max_model_len: int) -> list[int]:
        """The tokens of a prompt that are kept. Raises RequestError for a number of them that no prompt can have."""
        kept = self.truncate_prompt_tokens
        if kept is None:
            return list(prompt)
        if kept == -1:
            kept = max_model_len - min(self.asked_max_tokens or 1, max_model_len - 1)
        if not 1 <= kept <= max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or from 1 to {max_model_len}, got {kept}.",
                param="truncate_prompt_tokens",
            )
        return list(prompt[-kept:])

    def sampling(
        self,
        *,
        max_tokens: int,
        vocab_size: int,
        defaults: Mapping[str, float],
        bad_words: tuple[tuple[int, ...], ...] = (),
    ) -> SamplingParams:
        """Validated sampling parameters; `defaults` holds fields that were left out, and null leaves them out too.

        `bad_words` are the tokens of this body's. Raises RequestError naming the first field outside its range.
        """
        need_tokens("logit_bias", self.logit_bias or (), vocab_size)
        need_tokens("stop_token_ids", self.stop_token_ids or (), vocab_size)
        need_tokens("allowed_token_ids", self.allowed_token_ids or (), vocab_size)

        def of(name: str, otherwise: float = 0.0) -> float:
            value = getattr(self, name)
            return float(defaults.get(name, otherwise) if value is None else value)

        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=of("temperature", 1.0),
            top_p=of("top_p", 1.0),
            # More than the vocabulary is the vocabulary, and the engine's field is 32 bits wide.
            top_k=min(int(defaults.get("top_k", 0)) if self.top_k is None else self.top_k, vocab_size),
            min_p=of("min_p"),
            repetition_penalty=of("repetition_penalty", 1.0),
            presence_penalty=of("presence_penalty"),
            frequency_penalty=of("frequency_penalty"),
            logit_bias=self.logit_bias or {},
            bad_words=bad_words,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )
        sampling.validate()
        return sampling


def concrete_seed(seed: int | None, draw: int) -> int:
    """The 64-bit seed of a request: the caller's modulo 2^64 (so -1 is 2^64 - 1), or the one drawn for it."""
    return (draw if seed is None else seed) % SEED_SPACE


def need_tokens(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise RequestError unless every token id is one of the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{param} holds token id {token_id}, and the model's vocabulary is 0 to {vocab_size - 1}.", param=param
            )


def is_none(value: object) -> bool:
    """Of fields of an answer that are left out unless they were asked for."""
    return value is None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written; `completion_tokens` counts what was delivered, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """What a chunk says of the tokens behind its text, where a request asks for it."""

    logprobs: Any = None  # in the shape of the endpoint
    token_ids: list[int] | None = None


NO_DETAILS = TokenDetails()

_encode_json = msgspec.json.Encoder().encode
_LINE_ENDS = tuple((end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\x85\u2028\u2029")


def _encode_line(value: object) -> bytes:
    """JSON that nobody takes for more than one line: many clients end lines where Unicode does, not as events do."""
    encoded = _encode_json(value)
    if not encoded.isascii():
        for end, escaped in _LINE_ENDS:
            encoded = encoded.replace(end, escaped)
    return encoded


class ChunkEncoder:
    """Encodes the events of one streamed answer: the parts that stay the same are encoded once.

    Every method returns the bytes of whole server-sent events. With `with_usage`, each chunk has a `usage` field, null
    unless given.
    """

    object: ClassVar[str]
    constants: ClassVar[Mapping[str, str]] = {}  # more fields of every chunk

    def __init__(self, *, id: str, created: int, model: str, fingerprint: str, with_usage: bool) -> None:
        same = {
            "id": id,
            "object": self.object,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
            **self.constants,
        }
        self._head = b"data: " + msgspec.json.encode(same)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if with_usage else b"}\n\n"
        self._encode = _encode_line

    def start(self, index: int, usage: Usage | None = None, prompt_token_ids: list[int] | None = None) -> bytes:
        """What comes before a choice's text; may be nothing."""
        raise NotImplementedError

    def text(self, index: int, text: str, usage: Usage | None = None, details: TokenDetails = NO_DETAILS) -> bytes:
        """More text of a choice."""
        raise NotImplementedError

    def finish(self, index: int, reason: str, usage: Usage | None = None) -> bytes:
        """The last chunk of a choice."""
        raise NotImplementedError

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of a stream with `include_usage`: no choices."""
        return self._head + self._end(usage)

    def _details(self, details: TokenDetails) -> bytes:
        """Fields of a choice; nearly always those without details."""
        if details is NO_DETAILS:
            return b'"logprobs":null,'
        token_ids = b"" if details.token_ids is None else b'"token_ids":' + self._encode(details.token_ids) + b","
        return b'"logprobs":' + self._encode(details.logprobs) + b"," + token_ids

    def _end(self, usage: Usage | None) -> bytes:
        return b"]" + (self._tail if usage is None else b',"usage":' + usage.model_dump_json().encode() + b"}\n\n")
