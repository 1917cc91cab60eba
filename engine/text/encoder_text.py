"""An encoder's text side: texts, and pairs of them, to the tokens that it reads whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self

from engine.errors import RequestError
from engine.models.spec import EncoderSpec, ModelInfo
from engine.request import TextInput
from engine.text.tokenizer import Tokenizer, WholeText


class EncoderText:
    """Texts to token ids. Safe to use from several threads; long ones, or many, belong in a thread of their own."""

    tool_format = None  # it holds no conversations, calls and reasoning
    reasons = False

    def __init__(self, tokenizer: Tokenizer, max_input_len: int) -> None:
        """`max_input_len`: tokens of a text, special ones included.

        Raises FormatError for a tokenizer whose template cannot be applied.
        """
        tokenizer.encode_whole(["", ("", "")])
        self.tokenizer = tokenizer
        self.max_input_len = max_input_len

    @classmethod
    def from_info(cls, info: ModelInfo[EncoderSpec]) -> Self:
        """The text side of a loaded checkpoint. Raises FormatError for a tokenizer that is malformed."""
        return cls(Tokenizer.from_info(info), info.spec.max_position)

    @property
    def chats(self) -> bool:
        """It holds no conversations."""
        return False

    @property
    def marker_ids(self) -> dict[str, int]:
        return {}

    def begins_reasoning(self, prompt: Sequence[int]) -> bool:
        return False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text, between those of the template where `add_special_tokens`, however long it is."""
        (whole,) = self.tokenizer.encode_whole([text])
        return whole.ids if add_special_tokens else whole.own_ids()

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> NoReturn:
        """Raises RequestError: an encoder holds no conversations."""
        raise RequestError(
            "This model is an encoder: it has no chat template.", param="messages", code="no_chat_template"
        )

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> NoReturn:
        """Raises RequestError: an encoder's tokens are not made text again."""
        raise RequestError("This model is an encoder: its tokens are not made text again.", param="model")

    def stream(
        self,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        include_stop: bool = False,
        skip_special: bool = True,
        show_markers: bool = False,
    ) -> NoReturn:
        """Raises RequestError: an encoder continues no text."""
        raise RequestError("This model is an encoder: it continues no text.", param="model")

    def token_bytes(self, token_id: int) -> NoReturn:
        """Raises RequestError as `decode`."""
        self.decode((token_id,))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token as the vocabulary writes it."""
        return [self.tokenizer.id_to_piece(token_id) for token_id in token_ids]

    def bad_words(self, words: Sequence[str]) -> NoReturn:
        """Raises RequestError: an encoder continues no text."""
        raise RequestError("This model is an encoder: it continues no text.", param="model")

    def encode_texts(self, texts: Sequence[str | tuple[str, str]], *, truncate: int | None = None) -> list[TextInput]:
        """What the encoder is given of each text, or of each pair.

        `truncate` cuts those that have more tokens, behind which the template's last ones follow; -1 stands for
        `max_input_len`. Raises RequestError for a text that has more, and for a limit that is none.
        """
        limit = self.max_input_len if truncate == -1 else truncate
        if limit is not None and not 1 <= limit <= self.max_input_len:
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or from 1 to {self.max_input_len}, got {truncate}.",
                param="truncate_prompt_tokens",
            )
        inputs = []
        for index, whole in enumerate(self.tokenizer.encode_whole(texts)):
            ids, types = whole.ids, whole.types
            if limit is not None and len(ids) > limit:
                ids, types = cut(whole, limit)
            if not 1 <= len(ids) <= self.max_input_len:
                raise RequestError(
                    f"input {index} must have 1 to {self.max_input_len} tokens, got {len(ids)}.",
                    param="input",
                    code="context_length_exceeded" if ids else None,
                )
            inputs.append(TextInput(ids, types.index(1) if 1 in types else None))
        return inputs


def cut(whole: WholeText, limit: int) -> tuple[list[int], list[int]]:
    """The first `limit` ids and types of a text, the last of them those of the template that end it."""
    num_ends = 0
    while num_ends < min(limit - 1, len(whole.ids)) and whole.special[-1 - num_ends]:
        num_ends += 1
    kept, end = limit - num_ends, len(whole.ids) - num_ends
    return whole.ids[:kept] + whole.ids[end:], whole.types[:kept] + whole.types[end:]
