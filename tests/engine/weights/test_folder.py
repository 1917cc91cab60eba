from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.config import QUANTIZATIONS
from engine.errors import ConfigError, FormatError, ModelError, SourceError, UnsupportedModelError
from engine.weights import load_model
from engine.weights.checkpoint import open_checkpoint
from engine.weights.convert import convert
from engine.weights.folder import INDEX, WHOLE, FolderCheckpoint, files_of
from engine.weights.strict_json import MAX_JSON_BYTES
from tests.tiny_gguf import CHAT_TEMPLATE, VOCAB
from tests.tiny_hf import TinyFolder, encode, tokenizer_json, write_safetensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "tiny"


def packed_bytes(path: Path, quantization: str | None = None) -> dict[str, bytes]:
    """Every packed tensor of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        _, tensors = convert(checkpoint, quantization=quantization)
        return {tensor.name: b"".join(chunk.tobytes() for chunk in tensor.chunks()) for tensor in tensors}


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("shards", [1, 3, 20])
def test_whole_and_in_shards(folder: Path, shards: int) -> None:
    model = TinyFolder(tie=False)
    assert packed_bytes(model.write(folder, shards=shards)) == packed_bytes(model.write(folder.with_name("whole")))
    with FolderCheckpoint(folder) as checkpoint:
        assert checkpoint.format_name == "safetensors"
        assert checkpoint.tensors.keys() == model.tensors.keys()
        for name, values in model.tensors.items():
            tensor = checkpoint.tensors[name]
            assert (tensor.shape, tensor.type_name, tensor.nbytes) == (values.shape, "BF16", 2 * values.size)
            assert checkpoint.read_rows(name, 0, tensor.num_rows).tobytes() == encode(values, "BF16").tobytes()
        info, _ = convert(checkpoint)
    assert (info.checkpoint_format, info.chat_template) == ("BF16 safetensors", CHAT_TEMPLATE)
    assert (info.bos_token_id, info.eos_token_ids[0]) == (1, 2)


@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
def test_the_same_weights_are_the_same_bytes_in_either_format(
    folder: Path, stored: str, quantization: str | None
) -> None:
    model = TinyFolder(hidden=96, heads=3, kv_heads=3, head_dim=32, ffn=160, tie=False, dtype=stored)
    for name, values in model.tensors.items():
        if values.ndim == 1:  # GGUF has these in float32
            model.types[name] = "F32"
    from_folder = packed_bytes(model.write(folder, shards=2), quantization)
    gguf = model.as_gguf(stored).write(folder.with_suffix(".gguf"))
    assert packed_bytes(gguf, quantization) == from_folder
    with open_checkpoint(gguf) as one, open_checkpoint(folder) as other:
        ours, theirs = convert(one)[0].spec, convert(other)[0].spec
    assert ours.norm_eps == pytest.approx(theirs.norm_eps)  # GGUF has it in float32
    assert (ours.rope, ours.vocab_size, ours.head_dim) == (theirs.rope, theirs.vocab_size, theirs.head_dim)


def test_files_of_are_the_files_that_are_read(folder: Path) -> None:
    TinyFolder().write(folder, shards=2)
    for name in ("README.md", "pytorch_model.bin", "unrelated.safetensors", "original.json"):
        (folder / name).write_text("{}")
    opened: set[str] = set()
    watching = [True]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event == "open" and str(arguments[0]).startswith(str(folder)):
            opened.add(os.path.basename(str(arguments[0])))

    sys.addaudithook(watch)  # for the rest of the process, so it is told when to stop
    packed_bytes(folder)
    watching.clear()
    names = [path.name for path in files_of(folder)]
    assert names == sorted(names)
    assert opened == set(names)
    assert {INDEX, "config.json", "tokenizer.json", "chat_template.jinja"} < opened
    assert not {"README.md", "pytorch_model.bin", "unrelated.safetensors"} & opened


def test_the_digest_is_that_of_the_files_that_are_read(folder: Path) -> None:
    def digest() -> str:
        with FolderCheckpoint(folder) as checkpoint:
            return checkpoint.sha256()

    TinyFolder().write(folder, shards=2)
    first = digest()
    (folder / "README.md").write_text("changed")
    assert digest() == first
    seen = {first}
    for path in files_of(folder):
        before = path.read_bytes()
        if path.suffix == ".safetensors":
            path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        else:
            path.write_bytes(before + b"\n")
        seen.add(digest())
        path.write_bytes(before)
    assert len(seen) == 1 + len(files_of(folder))
    assert digest() == first


def test_a_folder_of_links_as_download_caches_have_it(folder: Path, tmp_path: Path) -> None:
    blobs = TinyFolder().write(tmp_path / "blobs", shards=2)
    expected = packed_bytes(blobs)
    folder.mkdir()
    for i, path in enumerate(sorted(blobs.iterdir())):
        hashed = path.rename(blobs / f"{i:040x}")
        (folder / path.name).symlink_to(os.path.relpath(hashed, folder))
    assert packed_bytes(folder) == expected


def test_one_safetensors_file_of_another_name(folder: Path) -> None:
    TinyFolder().write(folder)
    expected = packed_bytes(folder)
    (folder / WHOLE).rename(folder / "consolidated.safetensors")
    assert packed_bytes(folder) == expected
    shutil.copy(folder / "consolidated.safetensors", folder / "other.safetensors")
    with pytest.raises(SourceError, match=r"found consolidated.safetensors, other.safetensors without an index"):
        FolderCheckpoint(folder)


def test_the_whole_file_counts_where_there_are_shards_too(folder: Path) -> None:
    TinyFolder(seed=1).write(folder, shards=2)
    TinyFolder(seed=0).write(folder)
    assert packed_bytes(folder) == packed_bytes(TinyFolder(seed=0).write(folder.with_name("whole")))
    assert {path.name for path in files_of(folder) if "model" in path.name} == {WHOLE}


def reindex(**weight_map: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] |= {name.replace("__", "."): value for name, value in weight_map.items()}
        (folder / INDEX).write_text(json.dumps(index))

    return change


def overwrite(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"


def truncate(name: str, num_bytes: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)


def replace_by_folder(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def only_pickles(folder: Path) -> None:
    (folder / INDEX).unlink()
    for i, path in enumerate(sorted(folder.glob("*.safetensors"))):
        path.rename(folder / f"pytorch_model-{i + 1:05}.bin")


def add_tensor(file: str, name: str) -> Callable[[Path], object]:
    """Put one more tensor into a shard, the rest of which is written again as it was."""

    def change(folder: Path) -> None:
        model = TinyFolder()
        names = list(model.tensors)[0 if file == FIRST else 1 :: 2]
        tensors = {known: (model.types[known], model.tensors[known]) for known in names}
        write_safetensors(folder / file, {**tensors, name: ("F32", np.ones(64, np.float32))})

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), SourceError, r"cannot read .*config.json: No such file"),
        (overwrite("config.json", "[]"), FormatError, r"config.json at byte 0: expected a JSON object, found list"),
        (overwrite("config.json", '{"a": 1, "a": 2}'), FormatError, "the key 'a' is given twice"),
        (overwrite("config.json", '{"a"; 1}'), FormatError, r"config.json at byte 4: expected JSON: Expecting ':'"),
        (overwrite("config.json", b'{"\xff"}'), FormatError, r"config.json at byte 2: expected UTF-8"),
        (overwrite("config.json", "[" * 100_000), FormatError, "nested too deep"),
        (overwrite("config.json", " " * (MAX_JSON_BYTES + 1)), FormatError, f"expected at most {MAX_JSON_BYTES} bytes"),
        (overwrite(INDEX, "{}"), FormatError, "weight_map must be an object"),
        (overwrite(INDEX, '{"weight_map": []}'), FormatError, "weight_map must be an object"),
        (overwrite(INDEX, '{"weight_map": {}}'), FormatError, "weight_map must be an object"),
        (reindex(a=3), FormatError, r"weight_map\['a'\] must be the name of a .safetensors file .*, found 3"),
        *(
            (reindex(a=name), FormatError, r"weight_map\['a'\] must be the name of a .safetensors file beside")
            for name in (
                "../tiny.safetensors",
                "/etc/x.safetensors",
                "sub/x.safetensors",
                "..",
                ".safetensors/",
                "x\0.safetensors",
                "x\n.safetensors",
                "\ud800.safetensors",
                "x" * 300 + ".safetensors",
                "pytorch_model.bin",
                "",
            )
        ),
        (reindex(a="none.safetensors"), SourceError, r"cannot open .*none.safetensors: No such file"),
        (reindex(a=FIRST), FormatError, rf"{INDEX}: tensor 'a' must be in {FIRST}, found nowhere"),
        (
            reindex(model__norm__weight=FIRST),
            FormatError,
            rf"tensor 'model.norm.weight' must be in {FIRST}, found in {SECOND}",
        ),
        (add_tensor(FIRST, "model.norm.weight"), FormatError, rf"{SECOND}: tensor .*norm.weight' is also in {FIRST}"),
        (add_tensor(FIRST, "model.extra"), UnsupportedModelError, "tensors that are not supported: model.extra"),
        (overwrite(SECOND, b"1234"), FormatError, rf"{SECOND} at byte 0: expected a header length of 8 bytes"),
        (overwrite(FIRST, LFS_POINTER), FormatError, rf"{FIRST} at byte 0: .* Git LFS pointer, `git lfs pull`"),
        (truncate(SECOND, 10), FormatError, rf"{SECOND} at byte 8: tensor .* lies at .* it is truncated"),
        (lambda folder: (folder / FIRST).unlink(), SourceError, rf"cannot open .*{FIRST}: No such file"),
        (replace_by_folder(FIRST), SourceError, rf"cannot open .*{FIRST}: it is not a file"),
        (lambda folder: (folder / INDEX).unlink(), SourceError, rf"found {FIRST}, {SECOND} without an index"),
        (only_pickles, SourceError, rf"expected {WHOLE}, {INDEX} or .*, found pytorch_model-00001.bin: a pickle"),
        (lambda folder: (folder / "tokenizer.json").unlink(), ModelError, r"tokenizer.json"),
        (overwrite("generation_config.json", "[]"), FormatError, "generation_config.json: .* JSON object, found list"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_by_name(
    folder: Path, change: Callable[[Path], object], error: type[ModelError], message: str
) -> None:
    TinyFolder().write(folder, shards=2)
    change(folder)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=message) as caught:
        packed_bytes(folder)
    assert len(str(caught.value)) < 1000
    assert len(os.listdir("/proc/self/fd")) == open_before


def drop(name: str) -> Callable[[TinyFolder], object]:
    return lambda model: model.tensors.pop(name)


def reshape(name: str, *shape: int) -> Callable[[TinyFolder], object]:
    return lambda model: model.tensors.update({name: np.ones(shape, np.float32)})


def poison(name: str, value: float) -> Callable[[TinyFolder], object]:
    def change(model: TinyFolder) -> None:
        model.tensors[name][..., 3] = value

    return change


def store(name: str, kind: str, dtype: type[np.generic]) -> Callable[[TinyFolder], object]:
    def change(model: TinyFolder) -> None:
        model.types[name] = kind
        model.tensors[name] = np.ones(model.tensors[name].shape, dtype)

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            drop("model.layers.0.mlp.up_proj.weight"),
            FormatError,
            r"tensor model.layers.0.mlp.up_proj.weight \[96, 64\] is missing",
        ),
        (drop("model.norm.weight"), FormatError, r"tensor model.norm.weight \[64\] is missing"),
        (
            reshape("model.layers.1.self_attn.k_proj.weight", 64, 64),
            FormatError,
            r"tensor model.layers.1.self_attn.k_proj.weight: expected shape \[32, 64\], found \[64, 64\]",
        ),
        (
            reshape("model.layers.1.input_layernorm.weight", 1, 64),
            FormatError,
            r"input_layernorm.weight: expected shape \[64\], found \[1, 64\]",
        ),
        (
            store("model.layers.0.mlp.up_proj.weight", "I8", np.int8),
            UnsupportedModelError,
            "mlp.up_proj.weight: type I8 is not supported for matrices",
        ),
        (store("model.norm.weight", "F64", np.float64), UnsupportedModelError, "type F64 is not supported for vectors"),
        (poison("model.norm.weight", np.nan), FormatError, "tensor model.norm.weight holds a value that is not finite"),
        (
            poison("model.norm.weight", -np.inf),
            FormatError,
            "tensor model.norm.weight holds a value that is not finite",
        ),
        (
            poison("model.layers.1.mlp.down_proj.weight", np.nan),
            FormatError,
            "tensor model.layers.1.mlp.down_proj.weight: expected finite values .* found nan",
        ),
        (
            poison("model.layers.1.mlp.down_proj.weight", np.inf),
            FormatError,
            "tensor model.layers.1.mlp.down_proj.weight: expected finite values .* found inf",
        ),
    ],
)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_that_cannot_be_used_are_named(
    folder: Path, quantization: str, change: Callable[[TinyFolder], object], error: type[ModelError], message: str
) -> None:
    model = TinyFolder(dtype="F32")
    change(model)
    model.write(folder)
    with pytest.raises(error, match=message):
        packed_bytes(folder, quantization)


def untied(model: TinyFolder) -> None:
    model.config["tie_word_embeddings"] = False


def head(vocab: int) -> Callable[[TinyFolder], object]:
    """Add a head of its own, with so many rows."""

    def change(model: TinyFolder) -> None:
        model.tensors["lm_head.weight"] = np.ones((vocab, 64), np.float32)
        model.types["lm_head.weight"] = "BF16"

    return change


def add(name: str, *shape: int) -> Callable[[TinyFolder], object]:
    def change(model: TinyFolder) -> None:
        model.tensors[name], model.types[name] = np.ones(shape, np.float32), "F32"

    return change


def configure(**values: object) -> Callable[[TinyFolder], object]:
    return lambda model: model.config.update(values)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (untied, UnsupportedModelError, "lm_head.weight must be there where tie_word_embeddings is false"),
        (
            lambda model: model.config.pop("tie_word_embeddings"),
            UnsupportedModelError,
            "lm_head.weight must be there where tie_word_embeddings is absent, which is false",
        ),
        (head(300), FormatError, r"tensor lm_head.weight: expected shape \[307, 64\], found \[300, 64\]"),
        (configure(vocab_size=500), UnsupportedModelError, "vocab_size is 500, but .*embed_tokens.weight has 307 rows"),
        (
            configure(hidden_size=128),
            FormatError,
            r"embed_tokens.weight: expected shape \[307, 128\], found \[307, 64\]",
        ),
        (configure(num_key_value_heads=1), FormatError, r"k_proj.weight: expected shape \[16, 64\], found \[32, 64\]"),
        (
            configure(intermediate_size=128),
            FormatError,
            r"gate_proj.weight: expected shape \[128, 64\], found \[96, 64\]",
        ),
        (configure(eos_token_id=[2, 307]), FormatError, "eos_token_id must hold ids of the vocabulary, found 307"),
        (
            configure(quantization_config={"quant_method": "gptq", "bits": 4}),
            UnsupportedModelError,
            "quantization_config must be absent, the checkpoint has quant_method 'gptq'",
        ),
        (
            configure(model_type="mamba", architectures=["MambaForCausalLM"]),
            UnsupportedModelError,
            "model_type must be one of bert, .*, the checkpoint has 'mamba'",
        ),
        (
            configure(architectures=["LlamaForSequenceClassification"]),
            UnsupportedModelError,
            r"ForCausalLM: only these write text, got \['LlamaForSequenceClassification'\]",
        ),
        (
            add("model.layers.1.self_attn.q_proj.bias", 64),
            UnsupportedModelError,
            "tensors that are not supported: model.layers.1.self_attn.q_proj.bias",
        ),
        (
            add("model.layers.2.mlp.up_proj.weight", 96, 64),
            UnsupportedModelError,
            "tensors that are not supported: model.layers.2.mlp.up_proj.weight",
        ),
    ],
)
def test_configurations_that_contradict_the_weights(
    folder: Path, change: Callable[[TinyFolder], object], error: type[ModelError], message: str
) -> None:
    model = TinyFolder()
    change(model)
    model.write(folder)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=message):
        load_model(str(folder), home=folder.with_name("home"))
    assert not list((folder.with_name("home") / "packed").glob("*.seraph*"))
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_tokenizer_of_another_size_than_the_embedding(folder: Path) -> None:
    TinyFolder().write(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(VOCAB + 13))
    with pytest.raises(FormatError, match="the tokenizer has 320 tokens, the embedding 307 rows"):
        packed_bytes(folder)
    # Rows beyond the tokenizer's are padding, which many checkpoints have.
    TinyFolder(vocab=VOCAB + 13).write(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(VOCAB))
    assert load_model(str(folder), home=folder.with_name("home")).info.spec.vocab_size == VOCAB + 13


def test_tied_and_untied(folder: Path) -> None:
    model = TinyFolder()
    tied = packed_bytes(model.write(folder))
    assert "head" not in tied
    embed = "model.embed_tokens.weight"
    model.tensors["lm_head.weight"], model.types["lm_head.weight"] = model.tensors[embed].copy(), model.types[embed]
    assert packed_bytes(model.write(folder)) == tied  # a copy of the embedding is not kept twice
    untied(model)
    copied = packed_bytes(model.write(folder))
    assert copied == {**tied, "head": tied["embed"]}
    model.tensors["lm_head.weight"][5] += 1
    model.config["tie_word_embeddings"] = True
    own = packed_bytes(model.write(folder))
    assert own["embed"] == tied["embed"] != own["head"]


def test_a_shard_may_hold_more_than_the_index_says(folder: Path) -> None:
    """Readers of shards take all that is in them, the index only names the files."""
    expected = packed_bytes(TinyFolder().write(folder, shards=2))
    index = json.loads((folder / INDEX).read_text())
    one_of_each = {file: name for name, file in index["weight_map"].items()}
    index["weight_map"] = {name: file for file, name in one_of_each.items()}
    assert len(index["weight_map"]) == 2
    (folder / INDEX).write_text(json.dumps(index))
    assert packed_bytes(folder) == expected


def test_load_model(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    TinyFolder().write(folder, shards=2)
    edit(folder / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9)
    models = {
        quantization: load_model(str(folder), home=home, quantization=quantization) for quantization in QUANTIZATIONS
    }
    sizes = [models[quantization].nbytes for quantization in QUANTIZATIONS]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    for quantization, model in models.items():
        formats = [tensor.format for tensor in model.weights.values() if tensor.format is not None]
        assert {fmt.bits for fmt in formats} == {"none": {16}, "int8": {8}, "int4": {4, 8}}[quantization]
        assert (model.name, model.source.name, model.source.quantization) == ("tiny", "tiny", quantization)
        assert model.info.generation_defaults == {"temperature": 0.6, "top_p": 0.9}
        assert load_model(str(folder), home=home, quantization=quantization).path == model.path
    with pytest.raises(ConfigError, match="quantization must be one of none, int8, int4, got 'fp8'"):
        load_model(str(folder), home=home, quantization="fp8")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", FIRST, SECOND, INDEX])
def test_a_change_in_any_file_is_packed_again(folder: Path, tmp_path: Path, name: str) -> None:
    TinyFolder().write(folder, shards=2)
    first = load_model(str(folder), home=tmp_path / "home")
    status = (folder / name).stat()
    os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    second = load_model(str(folder), home=tmp_path / "home")
    assert (second.path, second.source.sha256) == (first.path, first.source.sha256)
    assert second.source.stamp != first.source.stamp
