"""Tiny random encoders as Hugging Face folders: embedding models with their modules, and cross-encoders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ("the", "a", "of", "water", "river", "moun", "##tain", "bread", "is", "in", "what", "why", "who")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-[]"
VOCAB = (*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS))
VOCAB_SIZE = 128
assert len(VOCAB) <= VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class TinyEncoder:
    """One published form in small."""

    model_type: str
    architecture: str
    hidden: int
    heads: int
    ffn: int
    layers: int = 2
    positions: int = 100  # of a text; RoBERTa's table has two more rows
    pooling: str | None = "mean"  # None: no modules beside the checkpoint
    normalize: bool = True
    labels: int = 0
    types: int = 2
    activation: str = "gelu"
    config: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_roberta(self) -> bool:
        return "roberta" in self.model_type

    def tensors(self, seed: int) -> dict[str, NDArray[np.float32]]:
        """The checkpoint's tensors by transformers' names, float32, near what keeps activations in their size."""
        rng = np.random.default_rng(seed)
        made: dict[str, NDArray[np.float32]] = {}

        def linear(name: str, outputs: int, inputs: int) -> None:
            made[name + ".weight"] = (rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)
            made[name + ".bias"] = (0.1 * rng.standard_normal(outputs)).astype(np.float32)

        def norm(name: str) -> None:
            made[name + ".weight"] = (1 + 0.2 * rng.standard_normal(self.hidden)).astype(np.float32)
            made[name + ".bias"] = (0.1 * rng.standard_normal(self.hidden)).astype(np.float32)

        prefix = ("roberta." if self.is_roberta else "bert.") if self.labels else ""
        rows = self.positions + 2 * self.is_roberta
        for name, size in (("word", VOCAB_SIZE), ("position", rows), ("token_type", self.types)):
            table = 0.5 * rng.standard_normal((size, self.hidden))
            made[f"{prefix}embeddings.{name}_embeddings.weight"] = table.astype(np.float32)
        norm(prefix + "embeddings.LayerNorm")
        for i in range(self.layers):
            layer = f"{prefix}encoder.layer.{i}."
            for part in ("query", "key", "value"):
                linear(f"{layer}attention.self.{part}", self.hidden, self.hidden)
            linear(layer + "attention.output.dense", self.hidden, self.hidden)
            norm(layer + "attention.output.LayerNorm")
            linear(layer + "intermediate.dense", self.ffn, self.hidden)
            linear(layer + "output.dense", self.hidden, self.ffn)
            norm(layer + "output.LayerNorm")
        if self.labels and self.is_roberta:
            linear("classifier.dense", self.hidden, self.hidden)
            linear("classifier.out_proj", self.labels, self.hidden)
        elif self.model_type == "bert":
            linear(prefix + "pooler.dense", self.hidden, self.hidden)  # of an embedding model: without influence
            if self.labels:
                linear("classifier", self.labels, self.hidden)
        return made

    def config_json(self) -> dict[str, object]:
        values: dict[str, object] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": self.activation,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": self.positions + 2 * self.is_roberta,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": 1 if self.is_roberta else 0,
            "type_vocab_size": self.types,
            "vocab_size": VOCAB_SIZE,
        }
        if self.labels:
            values["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.labels)}
            values["label2id"] = {f"LABEL_{i}": i for i in range(self.labels)}
        return {**values, **self.config}

    def write(self, folder: Path, seed: int) -> Path:
        """Write the checkpoint, its tokenizer and its modules into `folder` and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config_json()))
        save_file(self.tensors(seed), folder / "model.safetensors")
        (folder / "tokenizer.json").write_text(tokenizer_json(pairs_have_types=self.types > 1))
        if self.pooling is not None:
            write_modules(folder, self.pooling, normalize=self.normalize)
        return folder


def write_modules(folder: Path, pooling: str, *, normalize: bool, max_length: int | None = None) -> None:
    """The files of sentence-transformers beside a checkpoint."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    stages = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(stages))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**modes, "pooling_mode_max_tokens": False}))
    if max_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))


def tokenizer_json(*, pairs_have_types: bool) -> str:
    """A WordPiece tokenizer with BERT's template."""
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    second = 1 if pairs_have_types else 0
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=f"[CLS] $A [SEP] $B:{second} [SEP]:{second}",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.enable_truncation(128)  # as training scripts leave it in the file
    tokenizer.enable_padding(length=128)
    return tokenizer.to_str()


ENCODERS: Mapping[str, TinyEncoder] = {
    "minilm": TinyEncoder("bert", "BertModel", 96, 3, 160, layers=3),
    "bge": TinyEncoder("bert", "BertModel", 64, 4, 96, pooling="cls"),
    "e5": TinyEncoder("xlm-roberta", "XLMRobertaModel", 128, 2, 224, types=1),
    "bare": TinyEncoder(
        "bert", "BertModel", 64, 2, 96, pooling=None, normalize=False, activation="gelu_new",
        config={"layer_norm_eps": 1e-5},
    ),
    "cross": TinyEncoder("bert", "BertForSequenceClassification", 96, 3, 96, pooling=None, labels=1),
    "classes": TinyEncoder(
        "roberta", "RobertaForSequenceClassification", 64, 4, 128, pooling=None, labels=3, types=1
    ),
}  # fmt: skip


def seed_of(name: str) -> int:
    return 500 + list(ENCODERS).index(name)


def digest_of(name: str) -> str:
    """SHA-256 over the tensors of ENCODERS[name]: whether golden vectors belong to these weights."""
    digest = hashlib.sha256()
    for tensor, values in sorted(ENCODERS[name].tensors(seed_of(name)).items()):
        digest.update(f"{tensor} {list(values.shape)}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
