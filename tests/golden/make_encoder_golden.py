"""Make encoders.npz and, with --minilm FOLDER, minilm.npz with Hugging Face transformers; README.md says how and what.

Every text is computed by itself, in float32 on the CPU, so that no padding is involved. Nothing of `engine` is
imported.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.golden.retrieval import ODD, PASSAGES, QUESTIONS
from tests.tiny_encoders import ENCODERS, VOCAB_SIZE, TinyEncoder, digest_of, seed_of

HERE = Path(__file__).parent
LENGTHS = (1, 2, 31, 32, 33, 70, 100)


def pooled(rows: NDArray[np.float32], encoder: TinyEncoder) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = rows[0] if encoder.pooling == "cls" else rows.mean(axis=0)
    if encoder.normalize:
        vector = vector / np.float32(np.linalg.norm(vector))
    return vector


def make_tiny() -> None:
    arrays: dict[str, Any] = {}
    for name, encoder in ENCODERS.items():
        kind = transformers.AutoModelForSequenceClassification if encoder.labels else transformers.AutoModel
        with tempfile.TemporaryDirectory() as folder:
            path = encoder.write(Path(folder), seed_of(name))
            model = kind.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        rng = np.random.default_rng(seed_of(name))
        # Ids of the paddings of either family are left out: RoBERTa gives them no position.
        texts = [rng.integers(2, VOCAB_SIZE, length, dtype=np.int64) for length in LENGTHS]
        types = [(np.arange(length) > length // 2).astype(np.int64) * (encoder.types > 1) for length in LENGTHS]
        out = []
        for ids, kinds in zip(texts, types, strict=True):
            given = {"input_ids": torch.from_numpy(ids)[None], "token_type_ids": torch.from_numpy(kinds)[None]}
            with torch.inference_mode():
                answer = model(**given)
            if encoder.labels:
                out.append(answer.logits[0].numpy())
            else:
                out.append(pooled(answer.last_hidden_state[0].numpy(), encoder))
        arrays |= {
            f"{name}_token_ids": np.concatenate(texts).astype(np.int32),
            f"{name}_types": np.concatenate(types).astype(np.int32),
            f"{name}_out": np.stack(out),
            f"{name}_digest": np.array(digest_of(name)),
        }
        print(f"{name}: {list(np.stack(out).shape)}")
    starts = np.cumsum([0, *LENGTHS]).astype(np.int32)
    np.savez_compressed(HERE / "encoders.npz", starts=starts, **arrays)


def make_minilm(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors, ids = [], []
    for text in (*PASSAGES, *(question for question, _ in QUESTIONS), *ODD):
        given = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            rows = model(**given).last_hidden_state[0].numpy()
        vector = rows.mean(axis=0)
        vectors.append(vector / np.linalg.norm(vector))
        ids.append(given["input_ids"][0].numpy())
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int32)
    np.savez_compressed(
        HERE / "minilm.npz", token_ids=np.concatenate(ids).astype(np.int32), starts=starts, vectors=np.stack(vectors)
    )
    print(f"MiniLM: {len(vectors)} texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="the folder of all-MiniLM-L6-v2")
    options = parser.parse_args()
    make_tiny()
    if options.minilm is not None:
        make_minilm(options.minilm)


if __name__ == "__main__":
    main()
