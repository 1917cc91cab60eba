from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import FormatError, ModelError, SourceError
from engine.weights.convert import convert
from engine.weights.gguf import MAX_ENTRIES, MAX_HEADER_BYTES, GgufFile
from engine.weights.gguf_checkpoint import GgufCheckpoint
from tests.tiny_gguf import TinyLlama

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return U64.pack(len(data)) + data


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + U32.pack(len(dims)) + b"".join(map(U64.pack, dims)) + U32.pack(kind) + U64.pack(offset)


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + U32.pack(version) + U64.pack(tensors) + U64.pack(keys) + b"".join(parts)


def write(path: Path, data: bytes, *, padding: int = 4096) -> Path:
    path.write_bytes(data + bytes(padding))
    return path


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    model = TinyLlama(quant="Q8_0")
    path = model.write(tmp_path / "m.gguf")
    with GgufFile(path) as file:
        reader = gguf.GGUFReader(path)
        assert set(file.metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}
        for key, value in model.metadata.items():
            found = file.metadata[key]
            if isinstance(found, np.ndarray):
                found = found.tolist()
            assert found == (pytest.approx(value) if isinstance(value, float) else value), key
        assert list(file.tensors) == [entry.name for entry in reader.tensors]
        for entry in reader.tensors:
            ours = file.tensors[entry.name]
            assert (ours.offset, ours.nbytes, ours.type) == (entry.data_offset, entry.n_bytes, entry.tensor_type)
            assert ours.shape == model.tensors[entry.name].shape
        ours = file.tensors["blk.1.ffn_up.weight"]
        theirs = next(entry for entry in reader.tensors if entry.name == ours.name)
        np.testing.assert_array_equal(file.read_rows(ours, 5, 70), theirs.data[5:70])


@pytest.mark.parametrize(
    ("kind", "raw", "expected"),
    [
        (gguf.GGUFValueType.UINT8, b"\xff", 255),
        (gguf.GGUFValueType.INT8, b"\xff", -1),
        (gguf.GGUFValueType.UINT16, b"\xff\xff", 65535),
        (gguf.GGUFValueType.INT16, b"\xfe\xff", -2),
        (gguf.GGUFValueType.INT32, b"\xfd\xff\xff\xff", -3),
        (gguf.GGUFValueType.UINT64, U64.pack(2**63), 2**63),
        (gguf.GGUFValueType.INT64, b"\xff" * 8, -1),
        (gguf.GGUFValueType.FLOAT32, struct.pack("<f", 0.5), 0.5),
        (gguf.GGUFValueType.FLOAT64, struct.pack("<d", 0.1), 0.1),
        (gguf.GGUFValueType.BOOL, b"\x01", True),
        (gguf.GGUFValueType.STRING, text("grüß"), "grüß"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_value_type_alone_and_in_arrays(
    tmp_path: Path, kind: gguf.GGUFValueType, raw: bytes, expected: object
) -> None:
    array = U32.pack(9) + U32.pack(kind) + U64.pack(3) + raw * 3
    data = header(text("one"), U32.pack(kind), raw, text("many"), array, keys=2)
    with GgufFile(write(tmp_path / "m.gguf", data)) as file:
        many = file.metadata["many"]
        assert file.metadata["one"] == expected
        assert list(many) == [expected] * 3  # type: ignore[call-overload]


ONE_F32 = tensor("a", (32,))
MALFORMED: dict[str, tuple[bytes, int | None, str]] = {
    "magic": (header(magic=b"GGML"), 0, "expected the magic b'GGUF', found b'GGML'"),
    "version 1": (header(version=1), 4, "expected GGUF version 2 or 3, found 1"),
    "big-endian": (header(version=3 << 24), 4, "(a big-endian file)"),
    "too many tensors": (header(tensors=2**63), 24, f"a table of {2**63} tensors needs {2**63 * 32} bytes"),
    "too many keys": (header(keys=2**40), 24, f"metadata of {2**40} keys needs"),
    "key length": (header(U64.pack(2**62), keys=1), 32, f"a metadata key needs {2**62} bytes, only 4096 are left"),
    "key UTF-8": (header(text(b"ab\xff"), keys=1), 34, "a metadata key: invalid UTF-8"),
    "value UTF-8": (header(text("k"), U32.pack(8), text(b"\xc3("), keys=1), 45, "k: invalid UTF-8"),
    "value type": (header(text("k"), U32.pack(13), keys=1), 33, "k: unknown value type 13"),
    "bool": (header(text("k"), U32.pack(7), b"\x02", keys=1), 37, "k: a bool must be 0 or 1, found 2"),
    "bools": (
        header(text("k"), U32.pack(9), U32.pack(7), U64.pack(2), b"\x01\x07", keys=1),
        None,
        "bools must be 0 or 1, found 7",
    ),
    "array length": (
        header(text("k"), U32.pack(9), U32.pack(5), U64.pack(2**61), keys=1),
        49,
        f"k: an array of {2**61} values needs {2**63} bytes",
    ),
    "string array length": (
        header(text("k"), U32.pack(9), U32.pack(8), U64.pack(2**40), keys=1),
        49,
        f"k: an array of {2**40} strings needs",
    ),
    "nested array": (
        header(text("k"), U32.pack(9), U32.pack(9), U64.pack(1), keys=1),
        None,
        "arrays of arrays are not supported",
    ),
    "key twice": (header(*[text("k") + U32.pack(7) + b"\x01"] * 2, keys=2), 38, "metadata key 'k' is given twice"),
    "alignment": (
        header(text("general.alignment"), U32.pack(4), U32.pack(24), keys=1),
        None,
        "general.alignment must be a power of two from 8 up, found 24",
    ),
    "alignment type": (
        header(text("general.alignment"), U32.pack(8), text("32"), keys=1),
        None,
        "general.alignment must be a power of two from 8 up, found '32'",
    ),
    "no dimensions": (header(tensor("a", ()), tensors=1), 24, "tensor 'a': expected 1 to 4 dimensions, found 0"),
    "dimensions": (header(tensor("a", (1,) * 5), tensors=1), 24, "tensor 'a': expected 1 to 4 dimensions, found 5"),
    "dimension 0": (header(tensor("a", (32, 0)), tensors=1), 24, "tensor 'a': a dimension is 0 in [0, 32]"),
    "tensor type": (header(tensor("a", (32,), 999), tensors=1), 24, "tensor 'a': unknown type 999"),
    "removed type": (header(tensor("a", (32,), 4), tensors=1), 24, "tensor 'a': unknown type 4"),
    "row size": (
        header(tensor("a", (33, 2), 2), tensors=1),
        24,
        "tensor 'a': expected rows of a multiple of 32 values, found 33",
    ),
    "tensor twice": (header(ONE_F32, ONE_F32, tensors=2), 57, "tensor 'a' is given twice"),
    "misaligned": (
        header(tensor("a", (32,), 0, 8), tensors=1),
        24,
        "tensor 'a': offset 8 is not a multiple of the alignment 32",
    ),
    "out of range": (
        header(tensor("a", (32,), 0, 2**40), tensors=1),
        24,
        "but the file has 4153 bytes: it is truncated or damaged",
    ),
    "overflowing size": (header(tensor("a", (2**32, 2**32)), tensors=1), 24, "tensor 'a' [4294967296, 4294967296] F32"),
    "overlap": (header(ONE_F32, tensor("b", (32,), 0, 96), tensors=2), None, "tensors 'a' and 'b' overlap"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_say_where_and_why_and_cost_nothing(tmp_path: Path, case: str) -> None:
    data, offset, message = MALFORMED[case]
    path = write(tmp_path / "m.gguf", data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=re.escape(message)) as caught:
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    if offset is not None:
        assert caught.value.offset == offset


def test_a_header_larger_than_any_real_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.write(header(text("k"), U32.pack(9), U32.pack(0), U64.pack(MAX_HEADER_BYTES), keys=1))
        file.truncate(2 * MAX_HEADER_BYTES)  # sparse: the bytes that the array claims are there
    with pytest.raises(FormatError, match=f"are left in a header's {MAX_HEADER_BYTES} bytes"):
        GgufFile(path)


def test_tables_longer_than_any_real_one_are_refused(tmp_path: Path) -> None:
    """Their entries would take twenty times the memory that they take in the file."""
    found = MAX_ENTRIES + 1
    for head in (header(tensors=found), header(keys=found)):
        path = write(tmp_path / "m.gguf", head, padding=40 * found)
        with pytest.raises(FormatError, match=f"expected at most {MAX_ENTRIES} tensors and keys, found") as caught:
            GgufFile(path)
        assert caught.value.offset == 8


def test_a_file_that_is_missing_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot open .*No such file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(SourceError, match=r"cannot open .*Is a directory"):
        GgufFile(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = TinyLlama().write(tmp_path / "m.gguf")
    with GgufFile(path) as file:
        last = max(file.tensors.values(), key=lambda entry: entry.offset)
        with path.open("r+b") as other:
            other.truncate(last.offset + 4)
        with pytest.raises(FormatError, match=f"tensor {last.name}: expected {last.nbytes} bytes, got 4"):
            file.read_rows(last, 0, 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int, Path]:
    """A valid file, the size of its header, and a path to write damaged copies to."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = TinyLlama(layers=1, vocab=261).write(folder / "whole.gguf")
    with GgufCheckpoint(path) as file:
        start = min(entry.offset for entry in file.tensors.values())
        convert(file)  # undamaged, it is good to the end
    return path.read_bytes(), start, folder / "damaged.gguf"


def use(path: Path, data: bytes) -> None:
    """Read and convert everything; only errors of our own may come out."""
    path.write_bytes(data)
    try:
        with GgufCheckpoint(path) as file:
            _, tensors = convert(file)
            for entry in tensors:
                assert sum(chunk.nbytes for chunk in entry.chunks()) == entry.nbytes
    except ModelError:
        pass


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FUZZ
@given(cut=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_a_format_error(whole: tuple[bytes, int, Path], cut: float) -> None:
    data, _, path = whole
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(FormatError):
        GgufFile(path).close()


@FUZZ
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_never_escape_our_errors(
    whole: tuple[bytes, int, Path], changes: list[tuple[float, int]]
) -> None:
    data, start, path = whole
    damaged = bytearray(data)
    for where, value in changes:
        damaged[int(where * start)] = value
    use(path, bytes(damaged))


@FUZZ
@given(where=st.floats(0, 1, exclude_max=True), value=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
def test_extreme_lengths_never_escape_our_errors(whole: tuple[bytes, int, Path], where: float, value: int) -> None:
    data, start, path = whole
    at = int(where * (start - 8))
    use(path, data[:at] + U64.pack(value) + data[at + 8 :])
