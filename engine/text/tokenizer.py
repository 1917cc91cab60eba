"""Text to token ids and back, by the model's own tokenizer, with control over what may become a control token.

Special tokens are those a checkpoint marks as such (`<|im_end|>`); they steer the model, so only its chat template may
make them. The same characters in anybody's text are plain text. Other added tokens (`<think>`, runs of spaces) are
ordinary vocabulary and are found wherever their text stands, as the model was trained.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import Encoding
from tokenizers import Tokenizer as HFTokenizer

from engine.errors import FormatError, RequestError
from engine.models.spec import ModelInfo
from engine.text.chat_template import RenderedPrompt
from engine.text.pieces import Pieces, token_pieces
from engine.weights.hf_tokenizer import MAX_VOCAB_SIZE, parse_tokenizer, read_tokenizer_folder

_RARE = "\U000f0000"
"""A character that no vocabulary has: it is left to everybody's own use."""


@dataclass(frozen=True, slots=True)
class WholeText:
    """A text, or two, as an encoder reads it."""

    ids: list[int]
    types: list[int]  # 1 for tokens of the second text, where the template tells them apart
    special: list[int]  # 1 for tokens of the template

    def own_ids(self) -> list[int]:
        """Those that are not the template's."""
        return [token_id for token_id, special in zip(self.ids, self.special, strict=True) if not special]


class Tokenizer:
    """The model's tokenizer. Safe to use from several threads at once.

    Encoding releases the GIL, at one to three microseconds per character: from an event loop, encode long texts with
    `asyncio.to_thread`.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        vocab_size: int | None = None,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        add_bos: bool = False,
        special_token_ids: Sequence[int] = (),
    ) -> None:
        """`vocab_size` is the model's, which may be padded beyond the tokenizer's (None: the tokenizer's).

        Raises FormatError where `tokenizer_json` is no tokenizer or does not fit the other arguments.
        """
        self._json = tokenizer_json
        self._tokenizer = _load(tokenizer_json)
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        num_tokens = 1 + max(vocab.values(), default=-1)
        if num_tokens > MAX_VOCAB_SIZE:
            raise FormatError(f"tokenizer: token ids must be below {MAX_VOCAB_SIZE}, found {num_tokens - 1}")
        self.vocab_size = num_tokens if vocab_size is None else vocab_size
        if num_tokens > self.vocab_size:
            raise FormatError(f"tokenizer: it has {num_tokens} tokens, the model's vocabulary only {self.vocab_size}")
        self._tokens = [""] * self.vocab_size
        for token, token_id in vocab.items():
            self._tokens[token_id] = token
        for token_id in (*eos_token_ids, *special_token_ids, *(() if bos_token_id is None else (bos_token_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise FormatError(f"tokenizer: special token ids must be below {self.vocab_size}, got {token_id}")
        if add_bos and bos_token_id is None:
            raise FormatError("tokenizer: text is to start with BOS, but no BOS token is named")
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        self.add_bos = add_bos
        added = self._tokenizer.get_added_tokens_decoder()
        marked = {token_id for token_id, token in added.items() if token.special}
        self.special_token_ids = frozenset(marked.union(special_token_ids))
        self._controls = frozenset(marked)  # what `encode` of the library would find inside a text
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown_id = vocab.get(unknown or "")
        if unknown is not None and unknown not in vocab:
            # Harmless where every character has tokens; where one has not, its text could not be encoded.
            self._encode(self._tokenizer, _RARE)
        self._blind: dict[bool, HFTokenizer] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_info(cls, info: ModelInfo[Any]) -> Self:
        """The tokenizer of a loaded checkpoint."""
        return cls(
            info.tokenizer_json,
            vocab_size=info.spec.vocab_size,
            bos_token_id=info.bos_token_id,
            eos_token_ids=info.eos_token_ids,
            add_bos=info.add_bos,
            special_token_ids=info.special_token_ids,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The tokenizer of a Hugging Face folder: tokenizer.json and the configurations beside it."""
        found = read_tokenizer_folder(folder)
        return cls(
            found.tokenizer_json,
            bos_token_id=found.bos_token_id,
            eos_token_ids=found.eos_token_ids,
            add_bos=found.add_bos,
            special_token_ids=found.special_token_ids,
        )

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The text of every special token, by id."""
        return tuple(self.id_to_piece(token_id) for token_id in sorted(self.special_token_ids))

    def encode_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of plain text; special-token text inside it is plain text too.

        With `add_bos` the ids start with exactly one BOS where the model wants one.
        """
        ids = self._encode(self._tokenizer, text)
        if not self._controls.isdisjoint(ids):
            ids = self._encode(self._plain(at_start=True), text)
        if add_bos and self.add_bos:
            assert self.bos_token_id is not None
            ids.insert(0, self.bos_token_id)
        return ids

    def encode_rendered(self, rendered: RenderedPrompt) -> list[int]:
        """Token ids of a rendered chat template: its special tokens are control tokens, those in content are text.

        Where content holds nothing that could be taken for a special token, these are the ids of the rendered text
        as it stands. BOS is the template's business.
        """
        if not rendered.stand_ins:
            return self._encode(self._tokenizer, rendered.marked)
        # The library itself says where control tokens are (it knows which of them swallow neighbouring spaces). Only
        # stretches between them that hold stand-ins are encoded again, with the characters the stand-ins stand for.
        marked = _encodable(rendered.marked)
        encoding = self._encoding(self._tokenizer, marked)
        ids: list[int] = []
        stretch: list[int] = []
        start = 0

        def close(end: int) -> None:
            text = marked[start:end]
            plain = text.translate(rendered.stand_ins)
            ids.extend(stretch if plain == text else self._encode(self._plain(at_start=start == 0), plain))
            stretch.clear()

        for token_id, (token_start, token_end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._is_control(token_id, marked[token_start:token_end]):
                close(token_start)
                ids.append(token_id)
                start = token_end
            else:
                stretch.append(token_id)
        close(len(marked))
        return ids

    def encode_whole(self, texts: Sequence[str | tuple[str, str]]) -> list[WholeText]:
        """Texts, or pairs of them, with the special tokens that the tokenizer's own template puts around and between.

        Special-token text inside a text is plain text. Many at once are faster than one by one: the library shares
        them among threads. Raises FormatError for a template that cannot be applied.
        """
        for text in texts:
            for part in (text,) if isinstance(text, str) else text:
                _encodable(part)
        found = self._whole(self._tokenizer, texts)
        marked = [i for i, whole in enumerate(found) if not self._controls.isdisjoint(whole.own_ids())]
        if marked:
            plain = self._whole(self._plain(at_start=True), [texts[i] for i in marked])
            for i, whole in zip(marked, plain, strict=True):
                found[i] = whole
        return found

    @staticmethod
    def _whole(tokenizer: HFTokenizer, texts: Sequence[str | tuple[str, str]]) -> list[WholeText]:
        try:
            encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        except BaseException as error:  # a template may name tokens that it does not have
            raise panicked(error) from None
        return [WholeText(each.ids, each.type_ids, each.special_tokens_mask) for each in encodings]

    def _is_control(self, token_id: int, written: str) -> bool:
        """Whether a token was written as a control token; the unknown token also stands for what has no other."""
        if token_id not in self._controls:
            return False
        return token_id != self._unknown_id or written.strip() == self._tokens[token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True, after_prompt: bool = False) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. Ids must be below `vocab_size`.

        A tokenizer of the SentencePiece kind puts a space before a text, and it is taken off here: what was encoded
        comes back. With `after_prompt` the ids continue a prompt, whose beginning is elsewhere: a space that a model
        wrote stays, so that prompt and answer, joined, are the text of their ids. (vLLM and llama.cpp do the same:
        Llama 2's answers begin with a space.)
        """
        pieces, skipped = self.pieces, self.special_token_ids if skip_special else frozenset[int]()
        data = b"".join([pieces[i] for i in token_ids if i not in skipped])
        if self._pieces.strip_first_space and not after_prompt:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def id_to_piece(self, token_id: int) -> str:
        """The token as the vocabulary writes it; "" for an id the tokenizer has no token for."""
        return self._tokens[token_id]

    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for in text."""
        return self.pieces[token_id]

    @property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of every token, [vocab_size]; b"" for ids the tokenizer has no token for.

        Raises UnsupportedModelError where a token's text depends on its neighbours.
        """
        return self._pieces.of_token

    @cached_property
    def _pieces(self) -> Pieces:
        return token_pieces(self._json, self._tokens)

    def _plain(self, *, at_start: bool) -> HFTokenizer:
        """The same tokenizer, blind to special tokens; not `at_start`: of a text that follows another.

        Other instances, because the switch is a state of the tokenizer and others may be encoding; made at the first
        text that needs them, which most servers never see.
        """
        with self._lock:
            if at_start not in self._blind:
                blind = _load(self._json if at_start else _without_first_prefix(self._json))
                blind.encode_special_tokens = True
                self._blind[at_start] = blind
            return self._blind[at_start]

    @classmethod
    def _encode(cls, tokenizer: HFTokenizer, text: str) -> list[int]:
        ids: list[int] = cls._encoding(tokenizer, _encodable(text)).ids
        return ids

    @staticmethod
    def _encoding(tokenizer: HFTokenizer, text: str) -> Encoding:
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        except BaseException as error:  # a tokenizer may name tokens that it does not have
            raise panicked(error) from None


def panicked(error: BaseException) -> BaseException:
    """What to raise in place of the library's bare Exceptions and its Rust panics; other errors as they are."""
    foreign = type(error) is Exception or type(error).__name__ == "PanicException"
    return FormatError(f"tokenizer: {error}") if foreign else error


def _load(tokenizer_json: str) -> HFTokenizer:
    try:
        tokenizer = parse_tokenizer(tokenizer_json)
    except ValueError as error:
        raise FormatError(f"tokenizer: {error}") from None
    tokenizer.no_truncation()  # whatever a checkpoint's training script left in the file
    tokenizer.no_padding()
    return tokenizer


def _without_first_prefix(tokenizer_json: str) -> str:
    """The tokenizer without the prefix that some Metaspace pre-tokenizers put before a whole text only."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(item) for item in value]
        if isinstance(value, dict):
            first = value.get("type") == "Metaspace" and value.get("prepend_scheme") == "first"
            return {**value, "prepend_scheme": "never"} if first else {k: changed(v) for k, v in value.items()}
        return value

    saved = json.loads(tokenizer_json)
    saved["pre_tokenizer"] = changed(saved.get("pre_tokenizer"))
    return json.dumps(saved)


def _encodable(text: str) -> str:
    """`text`, once it is sure that it can be written as UTF-8: JSON may carry half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text holds half of a surrogate pair (U+{ord(text[error.start]):04X}), which is no character."
        ) from None
    return text
