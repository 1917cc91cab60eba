"""Packed files. Their checksum finds damage; what it cannot find is a header that was made to lie."""

from __future__ import annotations

import hashlib
import struct
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
from hypothesis import strategies as st

from engine.text import ModelText
from engine.weights.checkpoint import open_checkpoint
from engine.weights.convert import convert
from engine.weights.pack import Source, open_packed, write_packed
from engine.weights.progress import NoProgress
from tests.fuzz.documents import changed
from tests.fuzz.harness import fuzz, ours
from tests.fuzz.strategies import Mark, Sample, damaged, tiny

PREFIX = struct.Struct("<8sIIQQ")
HEADER_AT = 64


@cache
def whole() -> bytes:
    with TemporaryDirectory() as made:
        checkpoint, packed = Path(made) / "m.gguf", Path(made) / "m.seraph"
        checkpoint.write_bytes(tiny().encode().data)
        with open_checkpoint(checkpoint) as file:
            info, tensors = convert(file)
            source = Source(name="m", sha256="0" * 64, stamp="")
            write_packed(packed, name="tiny", info=info, source=source, tensors=tensors, progress=NoProgress())
        return packed.read_bytes()


@cache
def header() -> Any:
    return msgspec.msgpack.decode(whole()[HEADER_AT : HEADER_AT + PREFIX.unpack_from(whole())[3]])


@cache
def sample() -> Sample:
    """The first bytes, which is all that is parsed; the rest of the file stays as it is."""
    marks = (Mark(8, 4, "format"), Mark(12, 4, "layout"), Mark(16, 8, "header bytes"), Mark(24, 8, "file bytes"))
    return Sample(whole()[: HEADER_AT + PREFIX.unpack_from(whole())[3]], marks)


def signed(head: bytes, magic: bytes, *numbers: int) -> bytes:
    """The first bytes of a file, with the checksum that fits them."""
    fixed = PREFIX.pack(magic, *numbers)
    return fixed + hashlib.sha256(fixed + head).digest() + head


def read(path: Path, first: bytes) -> None:
    """Open, and look at every weight: a view beyond the mapping would end the process."""
    if not path.exists():
        path.write_bytes(whole())
    with path.open("r+b") as file:
        file.write(first)
    with ours(path=path):
        model = open_packed(path)
        assert all(int(tensor.data.view("u1")[-1]) >= 0 for tensor in model.weights.values())
        model.close()
        with ours():
            text = ModelText.from_info(model.info)
            text.decode(text.encode("Hello"))


@fuzz(150, made=st.deferred(lambda: changed(header())))
def test_headers_that_lie(folder: Path, made: Any) -> None:
    try:
        head = msgspec.msgpack.encode(made)
    except (OverflowError, UnicodeEncodeError):  # numbers beyond 64 bits and half characters are not in the format
        return
    magic, version, layout, _, size = PREFIX.unpack_from(whole())
    read(folder / "m.seraph", signed(head, magic, version, layout, len(head), size))


@fuzz(100, head=st.deferred(lambda: damaged(sample())))
def test_damaged_headers_with_a_checksum_that_fits(folder: Path, head: bytes) -> None:
    if len(head) >= HEADER_AT:
        magic, *numbers = PREFIX.unpack_from(head)
        head = signed(head[HEADER_AT:], magic, *numbers)
    read(folder / "m.seraph", head)


@fuzz(100, head=st.deferred(lambda: damaged(sample())))
def test_damaged_headers(folder: Path, head: bytes) -> None:
    read(folder / "m.seraph", head)
