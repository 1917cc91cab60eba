"""Small byte-level tokenizers: every byte a token, some merges, and the special tokens a test asks for."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("<", "|"), ("|", ">"), ("e", "n"))
NUM_PLAIN = 256 + len(MERGES)


def byte_tokenizer(special: Sequence[str | AddedToken] = (), added: Sequence[str] = ()) -> Tokenizer:
    """Ids: bytes in the order of the alphabet's characters, MERGES, `special`, `added`."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    return tokenizer
