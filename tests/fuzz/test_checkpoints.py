"""Whole checkpoints, GGUF and folders: from damaged or contradictory files to a packed file that is opened and used."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.config import QUANTIZATIONS
from engine.models.spec import EncoderSpec
from engine.text import EncoderText, ModelText
from engine.weights.checkpoint import open_checkpoint
from engine.weights.convert import convert
from engine.weights.pack import Source, open_packed, write_packed
from engine.weights.progress import NoProgress
from tests.fuzz.documents import changed, encoded
from tests.fuzz.documents import values as documents
from tests.fuzz.harness import fuzz, limited, ours
from tests.fuzz.strategies import Gguf, Sample, damaged, rearranged, tiny
from tests.tiny_encoders import ENCODERS, write_modules
from tests.tiny_families import FAMILIES, tiny_folder, tiny_gguf
from tests.tiny_hf import TinyFolder

quantizations = st.sampled_from([None, *QUANTIZATIONS])

FAMILY_SIZES = {"hidden": 64, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 32, "vocab": 261}


def use(path: Path, quantization: str | None = None) -> None:
    """Read, convert, pack, open and speak; only errors of our own may come out, and nothing is left half written."""
    packed = path.parent / "packed" / "m.seraph"
    with ours(path=path), open_checkpoint(path) as checkpoint:
        info, tensors = convert(checkpoint, quantization=quantization)
        source = Source(name="m", sha256=checkpoint.sha256(), stamp="")
        try:
            write_packed(packed, name="m", info=info, source=source, tensors=tensors, progress=NoProgress())
        finally:
            assert packed.exists() or not list(packed.parent.glob("*"))
        model = open_packed(packed)
        assert model.info == info
        assert all(np.isfinite(tensor.data).all() for tensor in model.weights.values() if tensor.format is None)
        model.close()
        packed.unlink()
        with ours():
            if isinstance(info.spec, EncoderSpec):
                EncoderText.from_info(info).encode_texts(["Hello", ("Hello", "[SEP]")])
                return
            text = ModelText.from_info(info)
            assert text.decode(text.encode("Hello")).strip() in ("", "Hello")


@fuzz(100, made=rearranged(), quantization=quantizations)
def test_gguf_files_that_say_something_else(folder: Path, made: Gguf, quantization: str | None) -> None:
    path = folder / "m.gguf"
    path.write_bytes(made.encode().data)
    use(path, quantization)


@fuzz(60, data=damaged(tiny().encode()))
def test_damaged_gguf_files(folder: Path, data: bytes) -> None:
    path = folder / "m.gguf"
    path.write_bytes(data)
    use(path)


# Folders


@cache
def files(shards: int) -> dict[str, bytes]:
    """The files of a tiny folder."""
    from tempfile import TemporaryDirectory

    model = TinyFolder(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=32, vocab=261)
    with TemporaryDirectory() as made:
        folder = model.write(Path(made), shards=shards)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, content: dict[str, bytes]) -> Path:
    made = folder / "model"
    made.mkdir(exist_ok=True)
    for path in made.rglob("*"):
        if path.is_file():
            path.unlink()
    for name, data in content.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(data)
    return made


@cache
def configuration() -> Any:
    """A config.json with the values that decide something, spelled as older and newer files do."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    return {**json.loads(files(1)["config.json"]), "rope_scaling": scaling, "sliding_window": None}


@fuzz(60, config=st.deferred(lambda: changed(configuration()) | documents), quantization=quantizations)
def test_configurations(folder: Path, config: Any, quantization: str | None) -> None:
    use(put(folder, {**files(1), "config.json": encoded(config)}), quantization)


@cache
def family_files(name: str) -> dict[str, bytes]:
    """The files of a tiny folder of a family."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as made:
        folder = tiny_folder(name, **FAMILY_SIZES).write(Path(made))
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@fuzz(150, name=st.sampled_from(sorted(FAMILIES)), quantization=quantizations, data=st.data())
def test_configurations_of_families(folder: Path, name: str, quantization: str | None, data: st.DataObject) -> None:
    content = family_files(name)
    config = data.draw(changed(json.loads(content["config.json"])))
    use(put(folder, {**content, "config.json": encoded(config)}), quantization)


@fuzz(150, name=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_metadata_of_families(folder: Path, name: str, data: st.DataObject) -> None:
    """Keys of a GGUF file that are missing, of another kind, or of another size."""
    model = tiny_gguf(name, tiny_folder(name, **FAMILY_SIZES), "Q4_0", head_dim=FAMILY_SIZES["head_dim"])
    keys = sorted(key for key in model.metadata if key.startswith(f"{FAMILIES[name].gguf}."))
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)):
        old = model.metadata[key]
        near = [old + 1, old * 2, old * 1000] if isinstance(old, int) else [old, "x"]
        new = data.draw(
            st.sampled_from([None, 0, 1, 2**31, 1.5, -1.0, float("inf"), float("nan"), "yarn", True, *near])
        )
        if new is None:
            del model.metadata[key]
        else:
            model.metadata[key] = new
    use(model.write(folder / "m.gguf"))


@cache
def encoder_files(name: str) -> dict[str, bytes]:
    """The files of a tiny encoder's folder, modules of sentence-transformers among them."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as made:
        folder = replace(ENCODERS[name], layers=1).write(Path(made), 1)
        write_modules(folder, "mean", normalize=True, max_length=50)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@fuzz(150, name=st.sampled_from(sorted(ENCODERS)), quantization=quantizations, data=st.data())
def test_configurations_of_encoders(folder: Path, name: str, quantization: str | None, data: st.DataObject) -> None:
    """Keys of config.json and of the modules that are missing, of another kind, or of another size."""
    content = encoder_files(name)
    path = data.draw(st.sampled_from(sorted(path for path in content if path.endswith(".json"))))
    values = data.draw(changed(json.loads(content[path])) | documents)
    use(put(folder, {**content, path: encoded(values)}), quantization)


@fuzz(60, name=st.sampled_from(sorted(ENCODERS)), data=st.data())
def test_damaged_files_of_an_encoder(folder: Path, name: str, data: st.DataObject) -> None:
    content = dict(encoder_files(name))
    path = data.draw(st.sampled_from(sorted(content)))
    content[path] = data.draw(damaged(Sample(content[path], head=2000)))
    use(put(folder, content))


@fuzz(60, index=st.deferred(lambda: changed(json.loads(files(2)["model.safetensors.index.json"])) | documents))
def test_indexes(folder: Path, index: Any) -> None:
    use(put(folder, {**files(2), "model.safetensors.index.json": encoded(index)}))


@fuzz(40, config=st.deferred(lambda: changed(json.loads(files(1)["generation_config.json"])) | documents))
def test_generation_defaults(folder: Path, config: Any) -> None:
    use(put(folder, {**files(1), "generation_config.json": encoded(config)}))


@fuzz(60, shards=st.sampled_from([1, 2]), data=st.data())
def test_damaged_files_of_a_folder(folder: Path, shards: int, data: st.DataObject) -> None:
    """Any file: missing, damaged, or another one's."""
    content = dict(files(shards))
    name = data.draw(st.sampled_from(sorted(content)))
    if data.draw(st.booleans()):
        content[name] = data.draw(damaged(Sample(content[name], head=2000)))
    elif data.draw(st.booleans()):
        del content[name]
    else:
        content[name] = content[data.draw(st.sampled_from(sorted(content)))]
    use(put(folder, content))


def test_sizes_that_only_a_configuration_claims(tmp_path: Path) -> None:
    """Everything is checked against the tensors that are there before anything is made of it."""
    claims = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim",
              "num_key_value_heads", "max_position_embeddings")  # fmt: skip
    paths = []
    for key in claims:
        for claimed in (2**31 - 1, 2**40, 2**62 - 2**5):
            config = {**json.loads(files(1)["config.json"]), key: claimed}
            made = tmp_path / f"{key}-{claimed}"
            made.mkdir()
            for name, data in {**files(1), "config.json": encoded(config)}.items():
                (made / name).write_bytes(data)
            paths.append(str(made))
    script = """
        from pathlib import Path
        from engine.errors import SeraphError
        from engine.weights.checkpoint import open_checkpoint
        from engine.weights.convert import convert
        limit()
        for folder in given:
            with open_checkpoint(Path(folder)) as checkpoint:
                try:
                    _, tensors = convert(checkpoint)
                    print(sum(chunk.nbytes for tensor in tensors for chunk in tensor.chunks()))
                except SeraphError as error:
                    print(error)
    """
    assert len(limited(script, paths, megabytes=256)) == len(paths)
