"""How byte-level BPE cuts text before byte pairs are merged, by the names that GGUF files give it.

A name stands for a regular expression of the model's own tokenizer.json (for Tekken, of tekken.json), and for what
llama.cpp, whose converter writes the name, takes along with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A word is capitals and then small letters; letters without case and marks count as both.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class NamedPreTokenizer:
    """One way of cutting, and how the models that use it treat the pieces."""

    build: Callable[[], PreTokenizer]
    ignore_merges: bool = False  # a piece that is a token by itself is taken whole
    add_bos: bool = False  # where the metadata do not say


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _llama3() -> PreTokenizer:
    return _split(_LLAMA3)


def _tekken() -> PreTokenizer:
    return _split(_TEKKEN)


def _split(pattern: str) -> PreTokenizer:
    split = Split(Regex(pattern), behavior="isolated")
    return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS: Mapping[str, NamedPreTokenizer] = {
    "default": NamedPreTokenizer(_gpt2),
    "gpt-2": NamedPreTokenizer(_gpt2),
    "gpt2": NamedPreTokenizer(_gpt2),
    "smollm": NamedPreTokenizer(_smollm),
    "llama-bpe": NamedPreTokenizer(_llama3, ignore_merges=True, add_bos=True),
    "llama3": NamedPreTokenizer(_llama3, ignore_merges=True, add_bos=True),
    "llama-v3": NamedPreTokenizer(_llama3, ignore_merges=True, add_bos=True),
    "falcon3": NamedPreTokenizer(_llama3, ignore_merges=True, add_bos=True),
    "smaug-bpe": NamedPreTokenizer(_llama3),  # Smaug and SmolLM3
    "tekken": NamedPreTokenizer(_tekken, ignore_merges=True, add_bos=True),  # Mistral Nemo and what followed it
}
