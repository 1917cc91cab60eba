"""A model's text side in one object: what the server and offline use need of tokenizer, template and detokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from engine.errors import RequestError
from engine.models.spec import ModelInfo
from engine.text.chat_template import ChatTemplate
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import Tokenizer
from engine.text.tool_formats import (
    FORMATS,
    THINK,
    THINK_END,
    ToolFormat,
    find_format,
    generic_history,
    has_reasoning,
    shorten_ids,
)

TAIL_TOKENS = 16
"""Of a prompt, which tell whether it has begun an answer's reasoning."""


class ModelText:
    """Conversations and texts to token ids, and token ids back to text.

    Encoding takes microseconds per character with the GIL released for most of it: long texts belong in a thread.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, *, tool_format: ToolFormat | None = None
    ) -> None:
        """`tool_format` is how calls of tools are written; None: as the template says.

        Raises UnsupportedModelError for a tokenizer whose tokens cannot be made text one by one.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.num_pieces = len(tokenizer.pieces)  # made now, and not at the first answer
        self.tool_format: ToolFormat | None = None
        """How calls of tools are written; None without a template."""
        self.reasons = False
        """Whether answers may begin with reasoning."""
        self.marker_ids: dict[str, int] = {}
        """Ids of those of the texts around calls and reasoning that are special tokens."""
        self._shows_system = True
        if template is not None:
            self.tool_format = tool_format or find_format(template)
            self.reasons = has_reasoning(template)
            texts = self.tool_format.markers + (THINK + THINK_END if self.reasons else "")
            pieces = ((tokenizer.id_to_piece(i), i) for i in sorted(tokenizer.special_token_ids))
            self.marker_ids = {piece: i for piece, i in pieces if piece and piece in texts}
            if not self.tool_format.is_templated:
                self._shows_system = template.shows_system()

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self.template is not None

    @classmethod
    def from_info(cls, info: ModelInfo, *, chat_template: str | None = None, tool_format: str | None = None) -> Self:
        """The text side of a loaded checkpoint; `chat_template` and `tool_format` (one of FORMATS) are the operator's,
        instead of the model's.

        Raises FormatError for a template or tokenizer that is malformed.
        """
        tokenizer = Tokenizer.from_info(info)
        source = info.chat_template if chat_template is None else chat_template
        template = None
        if source is not None:
            template = ChatTemplate(
                source,
                bos_token=None if info.bos_token_id is None else tokenizer.id_to_piece(info.bos_token_id),
                eos_token=tokenizer.id_to_piece(info.eos_token_ids[0]) if info.eos_token_ids else None,
                special_tokens=tokenizer.special_tokens,
            )
        return cls(tokenizer, template, tool_format=None if tool_format is None else FORMATS[tool_format])

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation; `tools` and `variables` as in ChatTemplate.render.

        Where the template knows no tools, they, their calls and their results become plain messages.

        Raises RequestError, also for a model without a template.
        """
        if self.template is None:
            raise RequestError(
                "This model has no chat template: use completions, or give the server a template.",
                param="messages",
                code="no_chat_template",
            )
        assert self.tool_format is not None
        if not self.tool_format.is_templated and (tools or not self.template.knows_tools):
            try:
                messages = generic_history(messages, tools, shows_system=self._shows_system, form=self.tool_format)
                tools = None
            except RecursionError:  # of what writes them as JSON
                raise RequestError("The tools, or their calls, are nested too deeply.", param="tools") from None
        elif self.tool_format.id_length is not None:
            messages = shorten_ids(messages, self.tool_format.id_length)
        return self.tokenizer.encode_rendered(self.template.render(messages, tools=tools, **variables))

    def begins_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the start of reasoning, which its answer then goes on with."""
        return self.reasons and self.decode(prompt[-TAIL_TOKENS:], skip_special=False).rstrip().endswith(THINK)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain text, after one BOS where the model wants one and `add_special_tokens`."""
        return self.tokenizer.encode_text(text, add_bos=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out or, without `skip_special`, written as they are."""
        return self.tokenizer.decode(token_ids, skip_special=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token contributes to text, maybe part of a character; of a special token how it is written."""
        return self.tokenizer.pieces[token_id]

    def stream(
        self,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        show_markers: bool = False,
    ) -> Detokenizer:
        """A detokenizer for one choice; special tokens around calls and reasoning are shown with `show_markers`."""
        return Detokenizer(
            self.tokenizer,
            stop=stop,
            min_tokens=min_tokens,
            include_stop=include_stop,
            skip_special=skip_special,
            shown=frozenset(self.marker_ids.values()) if show_markers else frozenset(),
        )

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it; "" for ids it has no token for."""
        return [self.tokenizer.id_to_piece(token_id) for token_id in token_ids]

    def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of words that an answer may not hold, as SamplingParams takes them.

        A word is written in other tokens at the start of a text than behind a space, so both are meant, as in vLLM.
        Tokenizers that mark the start of a text by a space write a third way what begins a line.
        """
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip(" ")
            for written in (word, f" {bare}"):
                found[tuple(self.tokenizer.encode_text(written, add_bos=False))] = None
            found[self._inside(word)] = None
        return tuple(ids for ids in found if ids)

    def _inside(self, word: str) -> tuple[int, ...]:
        """The tokens of a word that begins a line; none where the line's end is in a token with its beginning."""
        before, ids = (self.tokenizer.encode_text(text, add_bos=False) for text in ("\n", f"\n{word}"))
        return tuple(ids[len(before) :]) if ids[: len(before)] == before else ()
