from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.errors import FormatError, SourceError
from engine.kernels.layout import LAYOUT_VERSION, dequantize
from engine.models.spec import ModelInfo
from engine.weights import pack
from engine.weights.convert import convert
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.pack import Source, TensorWriter, open_packed, write_packed
from engine.weights.progress import NoProgress
from tests.engine.weights.recording import Recorded
from tests.tiny_gguf import TinyLlama

SOURCE = Source(name="m.gguf", sha256="0" * 64, stamp="1:2")
HEADER_AT = 64


def packed(folder: Path, **shape: Any) -> Path:
    with GgufCheckpoint(TinyLlama(**shape).write(folder / "m.gguf")) as file:
        info, tensors = convert(file)
        path = folder / "m.seraph"
        write_packed(path, name="tiny", info=info, source=SOURCE, tensors=tensors, progress=NoProgress())
        return path


def test_what_was_written_is_mapped(tmp_path: Path) -> None:
    checkpoint = TinyLlama(tie=False).write(tmp_path / "m.gguf")
    progress = Recorded()
    path = tmp_path / "out.seraph"
    with GgufCheckpoint(checkpoint) as file:
        info, tensors = convert(file)
        write_packed(path, name="tiny", info=info, source=SOURCE, tensors=tensors, progress=progress)
        model = open_packed(path)
        assert (model.name, model.path, model.info, model.source) == ("tiny", path, info, SOURCE)
        assert model.nbytes == path.stat().st_size
        assert list(model.weights) == list(info.spec.tensor_shapes())
        for tensor in tensors:
            found = model.weights[tensor.name]
            assert found.format == tensor.format
            assert not found.data.flags.writeable
            assert found.data.dtype == (np.float32 if tensor.format is None else np.uint8)
            expected = np.concatenate([chunk.view(np.uint8) for chunk in tensor.chunks()])
            np.testing.assert_array_equal(found.data.view(np.uint8), expected)
    assert progress.work == [("Packing tiny", sum(tensor.nbytes for tensor in tensors), sum(t.nbytes for t in tensors))]
    assert sorted(tmp_path.iterdir()) == [checkpoint, path]


def test_a_copy_is_the_weights_without_the_file(tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path))
    copies = model.copied()
    assert list(copies) == list(model.weights)
    for name, tensor in model.weights.items():
        assert copies[name].format == tensor.format
        assert copies[name].data.dtype == tensor.data.dtype
        assert not np.shares_memory(copies[name].data, tensor.data)
        assert copies[name].data.ctypes.data % 64 == 0
        np.testing.assert_array_equal(copies[name].data, tensor.data)  # which is read again
    model.close()
    assert copies["embed"].data.any()


def test_tensors_are_aligned(tmp_path: Path) -> None:
    path = packed(tmp_path, hidden=96, heads=3, kv_heads=1, head_dim=32)
    entries = header_of(path)["tensors"]
    assert entries[0]["offset"] % (2 << 20) == 0
    assert all(entry["offset"] % 64 == 0 for entry in entries)
    model = open_packed(path)
    assert all(tensor.data.ctypes.data % 64 == 0 for tensor in model.weights.values())


def test_a_header_longer_than_the_first_two_mebibytes_moves_the_data(tmp_path: Path) -> None:
    with GgufCheckpoint(TinyLlama().write(tmp_path / "m.gguf")) as file:
        info, tensors = convert(file)
        long = msgspec.structs.replace(SOURCE, name="x" * (2 << 20))
        path = tmp_path / "m.seraph"
        write_packed(path, name="tiny", info=info, source=long, tensors=tensors, progress=NoProgress())
    assert header_of(path)["tensors"][0]["offset"] == 4 << 20
    assert open_packed(path).source == long


def test_close_lets_go_of_the_file_but_not_of_views(tmp_path: Path) -> None:
    path = packed(tmp_path)

    def is_mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    model = open_packed(path)
    embed = model.weights["embed"]
    assert is_mapped()
    model.close()
    model.close()
    assert model.weights == {}
    assert embed.format is not None
    dequantize(embed.format, embed.data.view(np.uint8))
    del embed
    assert not is_mapped()


def test_the_mapping_outlives_a_new_file_in_its_place(tmp_path: Path) -> None:
    model = open_packed(packed(tmp_path))
    before = model.weights["embed"].data.copy()
    packed(tmp_path, seed=1)
    np.testing.assert_array_equal(model.weights["embed"].data, before)
    assert (open_packed(tmp_path / "m.seraph").weights["embed"].data != before).any()


def parts(path: Path) -> tuple[ModelInfo, list[TensorWriter]]:
    with GgufCheckpoint(path) as file:
        return convert(file)


def test_no_space_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    info, tensors = parts(TinyLlama().write(tmp_path / "m.gguf"))
    folder = tmp_path / "packed"
    with pytest.raises(SourceError, match=r"no space left in .*: packing tiny needs 2\.1 MB, 2\.0 MB are free"):
        write_packed(
            folder / "m.seraph",
            name="tiny",
            info=info,
            source=SOURCE,
            tensors=tensors,
            progress=Recorded(),
            free=lambda _: 2_000_000,
        )
    assert list(folder.iterdir()) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = packed(tmp_path)
    info, tensors = parts(tmp_path / "m.gguf")
    before = path.read_bytes()

    def failing() -> Iterator[NDArray[np.generic]]:
        yield np.zeros(1, np.float32)
        raise FormatError("the checkpoint ends here")

    tensors[-1] = TensorWriter(tensors[-1].name, None, tensors[-1].nbytes, failing)
    # Tensors before it were checked to be readable only from an open file: replace them all.
    tensors[:-1] = [
        TensorWriter(t.name, t.format, t.nbytes, lambda n=t.nbytes: iter([np.zeros(n, np.uint8)]))  # type: ignore[misc]
        for t in tensors[:-1]
    ]
    progress = Recorded()
    with pytest.raises(FormatError, match="the checkpoint ends here"):
        write_packed(path, name="tiny", info=info, source=SOURCE, tensors=tensors, progress=progress)
    assert progress.open == 0
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [tmp_path / "m.gguf", path]


def test_leftovers_of_killed_runs_are_removed_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "m.seraph.123.tmp").write_bytes(b"left by a run that was killed")
    (tmp_path / "other.seraph.123.tmp").write_bytes(b"perhaps being written right now")
    packed(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "m.seraph", "other.seraph.123.tmp"}


# Damage


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, 16)
    decoded = msgspec.msgpack.decode(data[HEADER_AT : HEADER_AT + length])
    assert isinstance(decoded, dict)
    return decoded


def forged(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The packed file `data` with a changed header and a checksum that fits it."""
    magic, version, layout, length, size = struct.unpack_from("<8sIIQQ", data)
    header = msgspec.msgpack.decode(data[HEADER_AT : HEADER_AT + length])
    change(header)
    encoded = msgspec.msgpack.encode(header)
    fixed = struct.pack("<8sIIQQ", magic, version, layout, len(encoded), size)
    head = fixed + hashlib.sha256(fixed + encoded).digest() + encoded
    return head + data[len(head) :]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    folder = tmp_path_factory.mktemp("packed")
    return packed(folder, layers=1, vocab=261).read_bytes(), folder / "damaged.seraph"


def test_a_forged_header_without_changes_opens(whole: tuple[bytes, Path]) -> None:
    data, path = whole
    path.write_bytes(forged(data, lambda header: None))
    assert open_packed(path).name == "tiny"


def tensor(index: int, **changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["tensors"][index].update(changes)


def spec(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["info"]["spec"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor(0, offset=(2 << 20) + 1), "tensor embed: expected a multiple of 64"),
        (tensor(0, offset=0), "tensor embed: expected a multiple of 64 from"),
        (tensor(1, offset=2 << 20), "tensor layers.0.attn_norm: expected a multiple of 64 from"),
        (tensor(-1, offset=2**40), "tensor final_norm: expected a multiple of 64"),
        (tensor(-1, offset=-64), "tensor final_norm: expected a multiple of 64"),
        (tensor(0, nbytes=7), "tensor embed: expected shape [261, 64], found [261, 64] in 7 bytes"),
        (tensor(1, nbytes=260), "tensor layers.0.attn_norm: expected shape [64], found [65] in 260 bytes"),
        (tensor(0, format=None), "tensor embed: expected shape [261, 64], found"),
        (
            tensor(0, format={"n": 261, "k": 96, "bits": 4, "correction": 1}),
            "tensor embed: expected shape [261, 64], found [261, 96]",
        ),
        (tensor(0, format={"n": 261, "k": 64, "bits": 5, "correction": 1}), "bits must be 4, 8 or 16, got 5"),
        (tensor(0, format={"n": 261, "k": 64, "bits": 4, "correction": 9}), "Invalid enum value 9"),
        (tensor(0, name="other"), "the table's 8 tensors are not those of its 1 layers"),
        (spec(num_layers=2), "the table's 8 tensors are not those of its 2 layers"),
        (spec(num_layers=2**62), f"the table's 8 tensors are not those of its {2**62} layers"),
        (spec(head_dim=7), "head_dim must be a multiple of 16, the checkpoint has 7"),
        (spec(vocab_size="many"), "Expected `int`, got `str`"),
        (lambda header: header.pop("info"), "missing required field `info`"),
        (lambda header: header["tensors"].clear(), "the table's 0 tensors"),
    ],
)
def test_a_header_that_contradicts_itself(
    whole: tuple[bytes, Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data, path = whole
    path.write_bytes(forged(data, change))
    with pytest.raises(FormatError, match=re.escape(message)):
        open_packed(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"S\0", "at byte 0: magic: expected b'SERAPHPK'"),
        (8, b"\x09", f"at byte 8: format version: expected {pack.FORMAT_VERSION}, found 9"),
        (12, b"\xff", f"at byte 12: layout version: expected {LAYOUT_VERSION}, found 255"),
        (16, b"\xff" * 8, "at byte 16: header bytes: expected at most"),
        (24, b"\x01" * 8, "at byte 24: file size: expected 72340172838076673, found"),
        (40, b"\x00\x00\x00", "at byte 32: header checksum: expected"),
    ],
)
def test_damage_in_the_first_bytes_is_named(whole: tuple[bytes, Path], offset: int, value: bytes, message: str) -> None:
    data, path = whole
    path.write_bytes(data[:offset] + value + data[offset + len(value) :])
    with pytest.raises(FormatError, match=re.escape(message)):
        open_packed(path)


@settings(max_examples=100, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_any_changed_byte_before_the_data_is_noticed(whole: tuple[bytes, Path], where: float, flip: int) -> None:
    data, path = whole
    at = int(where * (HEADER_AT + struct.unpack_from("<Q", data, 16)[0]))
    path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
    with pytest.raises(FormatError):
        open_packed(path)


@settings(max_examples=50, deadline=None)
@given(size=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_noticed(whole: tuple[bytes, Path], size: float) -> None:
    data, path = whole
    path.write_bytes(data[: int(size * len(data))])
    with pytest.raises(FormatError):
        open_packed(path)


def test_a_header_that_is_signed_but_not_utf_8(whole: tuple[bytes, Path]) -> None:
    data, path = whole
    magic, version, layout, length, size = struct.unpack_from("<8sIIQQ", data)
    encoded = data[HEADER_AT : HEADER_AT + length].replace(b"tiny", b"t\xadny", 1)
    fixed = struct.pack("<8sIIQQ", magic, version, layout, length, size)
    path.write_bytes(fixed + hashlib.sha256(fixed + encoded).digest() + encoded + data[HEADER_AT + length :])
    with pytest.raises(FormatError, match="the header cannot be decoded: 'utf-8' codec"):
        open_packed(path)


def test_bytes_after_the_end_are_noticed(whole: tuple[bytes, Path]) -> None:
    data, path = whole
    path.write_bytes(data + b"x")
    with pytest.raises(FormatError, match="the file is truncated or damaged"):
        open_packed(path)


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot open .*No such file"):
        open_packed(tmp_path / "none.seraph")
    with pytest.raises(SourceError, match=r"cannot open .*Is a directory"):
        open_packed(tmp_path)
