"""What requests take and answers give."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from seraph_client.retries import Timeouts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Message = Mapping[str, Any]
"""{"role": "user", "content": "Hi"}, and whatever else the API knows of messages."""

Messages = str | Sequence[Message]
"""A conversation; a string stands for one user message."""

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""Text or token ids, or several of either."""

Texts = str | Sequence[str]
"""A text, or several."""


class CallOptions(TypedDict, total=False):
    """What every call takes beside its own fields."""

    timeout: Timeouts | float
    """In place of the client's; a number is the whole call's. Not sent."""


class ModelOptions(CallOptions, total=False):
    """What every call to a model takes; the server's defaults hold for fields left out."""

    model: str
    extra: Mapping[str, Any]
    """Further fields, sent as they are."""


class Options(ModelOptions, total=False):
    """Fields of a chat or completion request beside what the model is to read."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float]
    ignore_eos: bool
    priority: int  # lower runs first
    cache_salt: str
    echo: bool  # of completions: the prompt before the answer
    add_special_tokens: bool  # of completions: whether text gets the tokenizer's BOS
    user: str


class TextOptions(ModelOptions, total=False):
    """Fields of a request about texts beside the texts."""

    truncate_prompt_tokens: int  # cut longer texts to so many; -1: to as many as the model reads
    priority: int  # lower runs first
    user: str


class EmbedOptions(TextOptions, total=False):
    """Fields of an embeddings request beside the texts."""

    dimensions: int
    encoding_format: Literal["float", "base64"]
    """How vectors travel, base64 where this is left out: a quarter of the bytes, the same numbers."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; `completion_tokens` counts what was delivered, over all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt's, found in the server's prefix cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a request."""

    index: int
    text: str
    finish_reason: str  # "stop" or "length"
    logprobs: Mapping[str, Any] | None = None  # as the API gives them


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    id: str
    model: str
    choices: tuple[Choice, ...]  # in the order of their index
    usage: Usage

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one choice of a streamed answer gained."""

    index: int
    text: str
    finish_reason: str | None  # set on the choice's last chunk
    logprobs: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector for each text, in their order."""

    model: str
    packed: tuple[array[float], ...]  # float32 [dimensions] each
    prompt_tokens: int

    @property
    def vectors(self) -> list[list[float]]:
        """The vectors as lists of Python's numbers; made anew each time."""
        return [vector.tolist() for vector in self.packed]

    def numpy(self) -> NDArray[np.float32]:
        """The vectors as one array, float32 [texts, dimensions]. Raises ImportError where numpy is not installed."""
        import numpy as np

        return np.array([np.frombuffer(vector, np.float32) for vector in self.packed], np.float32)


@dataclass(frozen=True, slots=True)
class Scores:
    """How well the texts of each pair go together, from 0 to 1, in the order of the pairs."""

    id: str
    model: str
    scores: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document and how well it answers the query, from 0 to 1."""

    index: int  # among the documents as they were given
    score: float
    document: str | None  # None where it was not asked for


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents by how well they answer a query, the best first."""

    id: str
    model: str
    results: tuple[Ranked, ...]
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text or a conversation as the model reads it."""

    ids: tuple[int, ...]
    max_model_len: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the server offers. What a server does not tell is None.

    `max_model_len` is in tokens; `kind` is what it is for ("generate", "embed", "score"); `state` says whether it would
    take a request now ("ready").
    """

    id: str
    max_model_len: int | None = None
    kind: str | None = None
    state: str | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """What the server says of itself: "ready", or what it does instead, and which models keep it from being ready."""

    status: str
    models: Mapping[str, str]  # name -> state, of those that are not ready

    @property
    def is_ready(self) -> bool:
        return self.status == "ready"


@dataclass(frozen=True, slots=True)
class Progress:
    """What of a model is being fetched, unpacked or packed, and how far it is. `total_bytes` None: nobody knows."""

    label: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model as the operator sees it.

    `state` is fetching, packing, starting or cancelled on its way in, failed (with its `reason`) where it did not get
    there, then ready, restarting, dead or draining. `host` is the model whose process an encoder lives in.
    """

    name: str
    names: tuple[str, ...]
    source: str
    kind: str | None
    state: str
    reason: str | None
    progress: Progress | None
    host: str | None
    pid: int | None
    weights_bytes: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    max_model_len: int | None


@dataclass(frozen=True, slots=True)
class LoadedModels:
    """Every model, and the memory, in bytes, that there is for all of them and that was promised to them."""

    models: tuple[LoadedModel, ...]
    memory_limit: int
    memory_promised: int
