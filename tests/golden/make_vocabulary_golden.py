"""Make vocabularies.json and the sentencepiece_*.model files: `python -m tests.golden.make_vocabulary_golden`.

SentencePiece itself trains small models, writes them and encodes texts with them; the `regex` package cuts texts with
the patterns that byte-level models publish. Nothing of `engine` is imported: the reference must not share our mistakes.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]
import sentencepiece  # type: ignore[import-not-found]

from tests.golden.texts import SENTENCEPIECE_TEXTS, SPECIAL_TEXTS, TEXTS

FOLDER = Path(__file__).parent

MODELS: dict[str, dict[str, Any]] = {
    # As Llama 2's and Mistral's are trained, with control tokens as in Mistral 7B v0.3.
    "llama": {
        "vocab_size": 900,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99,
        "control_symbols": ["[INST]", "[/INST]"],
    },
    # SentencePiece's own defaults, but for the kind of model and of normalization.
    "defaults": {"vocab_size": 600, "character_coverage": 0.98},
    "user_defined": {
        "vocab_size": 700,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "character_coverage": 0.98,
        "user_defined_symbols": ["<think>", "\u2581\u2581\u2581\u2581", "a\u2581b"],
    },
}

# Published with the models: GPT-2's encoder.py, Llama 3's tokenizer.json, Mistral Nemo's tekken.json.
GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS: dict[str, tuple[str, ...]] = {  # one after the other, each on what the one before left
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}|[^\p{N}]+", GPT2),
    "llama-bpe": (LLAMA3,),
    "tekken": (TEKKEN,),
}


def train(name: str) -> Any:
    """Train a model, write its file, and return its processor."""
    lines = [*(FOLDER / "perplexity.txt").read_text().splitlines(), *TEXTS]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **MODELS[name],
    )
    (FOLDER / f"sentencepiece_{name}.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def pieces(model: Any) -> list[tuple[str, float]]:
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]


def cut(text: str, patterns: tuple[str, ...]) -> list[int]:
    """Where the pieces of a text end, in code points."""
    parts = [text]
    for pattern in patterns:
        parts = [match.group() for part in parts for match in regex.finditer(pattern, part)]
    assert "".join(parts) == text, "the pattern leaves something out"
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part))
    return ends[1:]


def main() -> None:
    texts = [*TEXTS, *SPECIAL_TEXTS, *SENTENCEPIECE_TEXTS]
    models = {name: train(name) for name in MODELS}
    golden = {
        "made_with": f"sentencepiece {sentencepiece.__version__}, regex {regex.__version__}",
        "sentencepiece": {
            name: {"pieces": pieces(model), "texts": model.encode(texts)} for name, model in models.items()
        },
        "pre_tokenizers": {name: [cut(text, patterns) for text in TEXTS] for name, patterns in PATTERNS.items()},
    }
    path = FOLDER / "vocabularies.json"
    path.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{len(models)} models, {len(texts)} texts, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
