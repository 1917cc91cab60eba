"""What answers give."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seraph_client.options import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
class Logprob:
    """A token of an answer and how likely it was."""

    token: str  # its text; "bytes:\xf0\x9f" where that is none by itself
    logprob: float | None  # None: of an echoed prompt's first token, which nothing predicts
    top: tuple[Logprob, ...] = ()  # the most likely ones in its place, the best first
    raw: bytes | None = None  # of chats: what the token contributes to text
    offset: int | None = None  # of completions: characters of the choice's text before it


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """A token of a prompt, or one in its place, and how likely it was."""

    token: str
    logprob: float
    rank: int  # 1: nothing was likelier


PromptLogprobs = tuple[Mapping[int, PromptLogprob] | None, ...]
"""For each of a prompt's tokens, by token id: its own and those of the likeliest; None for the first."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an answer makes."""

    id: str
    name: str
    arguments: str  # the text of a JSON object; the beginning of one where the answer was cut off

    def result(self, content: str) -> Message:
        """The message that tells the model what the call has returned."""
        return {"role": "tool", "tool_call_id": self.id, "content": content}


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a call of a streamed answer gained. `id` and `name` come once, when it begins."""

    index: int  # among the choice's calls
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a request. What was not asked for is None."""

    index: int
    text: str
    finish_reason: str  # "stop", "length" or "tool_calls"
    logprobs: tuple[Logprob, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""  # what a model that reasons wrote before its answer
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def message(self) -> Message:
        """The choice as a message, for a conversation that goes on."""
        calls = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        message: dict[str, object] = {"role": "assistant", "content": self.text or (None if calls else "")}
        if self.reasoning:
            message["reasoning"] = self.reasoning
        return {**message, "tool_calls": calls} if calls else message


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

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's calls."""
        return self.choices[0].tool_calls

    @property
    def message(self) -> Message:
        """The first choice as a message, for a conversation that goes on."""
        return self.choices[0].message


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one choice of a streamed answer gained."""

    index: int
    text: str
    finish_reason: str | None  # set on the choice's last chunk
    logprobs: tuple[Logprob, ...] | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    reasoning: str = ""
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None


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
