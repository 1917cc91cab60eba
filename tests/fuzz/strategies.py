"""Valid inputs taken apart, and the ways in which they are damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import strategies as st

from tests.tiny_gguf import TinyLlama

# Numbers that break things

_SMALL = [0, 1, 2, 7, 31, 33, 0x7F, 0x80, 0xFF, 0x100, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_LARGE = [2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1]
extremes = st.sampled_from(_SMALL + _LARGE) | st.integers(0, 300)


def around(value: int) -> st.SearchStrategy[int]:
    """Numbers near `value`, and those that overflow something."""
    near = st.sampled_from([value - 1, value + 1, value * 2, value // 2, value + 32, value ^ 0x80, -value])
    return near | extremes


names = st.text(max_size=8) | st.sampled_from(["", "\0", "a" * 300, "../../x", "\ud7ff", "general.alignment", "%s{0}"])

# Bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """A number inside encoded bytes that says how to read others."""

    at: int
    width: int  # 4 or 8 bytes, little-endian
    what: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A valid file, the numbers in it, and how much of its beginning is worth damaging."""

    data: bytes = field(repr=False)
    marks: tuple[Mark, ...] = field(default=(), repr=False)
    head: int = 0  # 0: all of it

    def __repr__(self) -> str:
        return f"Sample({len(self.data)} bytes)"


@st.composite
def damaged(draw: st.DrawFn, sample: Sample) -> bytes:
    """The file with numbers changed, bytes flipped, parts cut, doubled or moved, up to three times."""
    data, marks = sample.data, sample.marks
    out = bytearray(data)
    places = st.integers(0, max(0, (sample.head or len(data)) - 1))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["mark", "mark", "mark", "flip", "number", "cut", "double", "splice", "insert"]))
        if kind == "mark" and marks:
            mark = draw(st.sampled_from(marks))
            if mark.at + mark.width > len(out):
                continue
            value = int.from_bytes(out[mark.at : mark.at + mark.width], "little")
            new = draw(around(value)) % (1 << 8 * mark.width)
            out[mark.at : mark.at + mark.width] = new.to_bytes(mark.width, "little")
            continue
        at = min(draw(places), max(0, len(out) - 1))
        length = draw(st.integers(1, 64))
        if kind == "flip" and out:
            out[at] ^= draw(st.integers(1, 255))
        elif kind == "number":
            out[at : at + 8] = draw(extremes).to_bytes(8, "little")
        elif kind == "cut":
            del out[at : at + length if draw(st.booleans()) else len(out)]
        elif kind == "double":
            out[at:at] = out[at : at + length]
        elif kind == "splice":
            other = draw(places)
            out[at : at + length] = data[other : other + length]
        else:
            out[at:at] = draw(st.binary(max_size=16))
    return bytes(out)


# GGUF

_STRUCTS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value as it is encoded: a scalar, a string, or a list of either."""

    type: GGUFValueType  # of the items, for a list
    value: object


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    dims: tuple[int, ...]  # innermost first, as the file has them
    type: int
    data: bytes = field(repr=False)
    offset: int | None = None  # None: where it comes to lie


@dataclass(frozen=True, slots=True)
class Gguf:
    """A GGUF file in parts."""

    keys: tuple[tuple[str, Value], ...]
    tensors: tuple[Tensor, ...]
    version: int = 3
    alignment: int = 32

    def __repr__(self) -> str:
        """What differs from the file that everything starts from."""
        base = tiny()
        keys = [pair for pair in self.keys if pair not in base.keys]
        gone = [key for key, _ in base.keys if key not in dict(self.keys)]
        tensors = [tensor for tensor in self.tensors if tensor not in base.tensors]
        text = (
            f"Gguf(keys={keys}, without={gone}, tensors={tensors} of {len(self.tensors)}, alignment={self.alignment})"
        )
        return text if len(text) < 4000 else text[:4000] + "..."

    def encode(self) -> Sample:
        """The file, its numbers that say how to read the rest, and where its data begin."""
        out = _Encoder()
        out.raw(b"GGUF")
        out.number(self.version, 4, "version")
        out.number(len(self.tensors), 8, "tensor count")
        out.number(len(self.keys), 8, "key count")
        for key, value in self.keys:
            out.text(key, "key length")
            out.value(value)
        data = bytearray()
        for tensor in self.tensors:
            data += bytes(-len(data) % self.alignment)
            out.text(tensor.name, "name length")
            out.number(len(tensor.dims), 4, "dimensions")
            for dim in tensor.dims:
                out.number(dim % 2**64, 8, "dimension")
            out.number(tensor.type, 4, "tensor type")
            out.number(len(data) if tensor.offset is None else tensor.offset % 2**64, 8, "offset")
            data += tensor.data
        out.raw(bytes(-len(out.data) % self.alignment))
        head = len(out.data)
        return Sample(bytes(out.data + data), tuple(out.marks), head)

    def with_key(self, key: str, value: Value | None) -> Gguf:
        """With `key` set to another value, in its old place where it had one (None: removed)."""
        new = () if value is None else ((key, value),)
        if any(name == key for name, _ in self.keys):
            return replace(self, keys=tuple(k for old in self.keys for k in (new if old[0] == key else (old,))))
        return replace(self, keys=(*self.keys, *new))


@dataclass(slots=True)
class _Encoder:
    data: bytearray = field(default_factory=bytearray)
    marks: list[Mark] = field(default_factory=list)

    def raw(self, data: bytes) -> None:
        self.data += data

    def number(self, value: int, width: int, what: str) -> None:
        self.marks.append(Mark(len(self.data), width, what))
        self.raw(value.to_bytes(width, "little"))

    def text(self, value: str, what: str) -> None:
        encoded = value.encode("utf-8", "surrogatepass")
        self.number(len(encoded), 8, what)
        self.raw(encoded)

    def value(self, value: Value) -> None:
        items = value.value if isinstance(value.value, list) else [value.value]
        if isinstance(value.value, list):
            self.number(GGUFValueType.ARRAY, 4, "value type")
            self.number(value.type, 4, "item type")
            self.number(len(items), 8, "item count")
        else:
            self.number(value.type, 4, "value type")
        for i, item in enumerate(items):
            if value.type is GGUFValueType.STRING:
                if i < 2:  # a mark for each of thousands of tokens would leave none for the rest
                    self.text(item, "string length")
                else:
                    encoded = item.encode("utf-8", "surrogatepass")
                    self.raw(struct.pack("<Q", len(encoded)) + encoded)
            else:
                self.raw(struct.pack(_STRUCTS[value.type], item))


def gguf_of(model: TinyLlama) -> Gguf:
    """The parts of a checkpoint."""
    keys = tuple((key, _valued(value)) for key, value in model.metadata.items())
    tensors = []
    for name, values in model.tensors.items():
        kind = GGMLQuantizationType[model.types[name]]
        stored = values if kind is GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)
        tensors.append(Tensor(name, values.shape[::-1], int(kind), np.ascontiguousarray(stored).tobytes()))
    return Gguf(keys, tuple(tensors))


def _valued(value: object) -> Value:
    first = value[0] if isinstance(value, list) else value
    match first:
        case bool():
            return Value(GGUFValueType.BOOL, value)
        case int():
            return Value(GGUFValueType.INT32 if isinstance(value, list) else GGUFValueType.UINT32, value)
        case float():
            return Value(GGUFValueType.FLOAT32, value)
        case _:
            return Value(GGUFValueType.STRING, value)


@cache
def tiny() -> Gguf:
    """The smallest checkpoint that goes all the way to a packed file."""
    return gguf_of(TinyLlama(hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=32, vocab=261))


def _scalar(kind: GGUFValueType, form: str) -> st.SearchStrategy[Value]:
    items: st.SearchStrategy[object]
    if form in ("<f", "<d"):
        items = st.floats(width=32 if form == "<f" else 64)
    elif form == "<?":
        items = st.booleans()
    else:
        size = 8 * struct.calcsize(form)
        low, high = (0, 2**size - 1) if form[-1].isupper() else (-(2 ** (size - 1)), 2 ** (size - 1) - 1)
        items = st.sampled_from([low, high, 0, 1, high // 2]) | st.integers(low, high)
    return items.map(lambda item: Value(kind, item))


scalars = st.one_of(*(_scalar(kind, form) for kind, form in _STRUCTS.items()))
texts = names.map(lambda text: Value(GGUFValueType.STRING, text))
arrays = st.lists(names, max_size=4).map(lambda items: Value(GGUFValueType.STRING, items)) | st.builds(
    lambda value, count: Value(value.type, [value.value] * count), scalars, st.integers(0, 5)
)
values = scalars | texts | arrays
"""Metadata values of every type, whatever the key expects."""


@st.composite
def rearranged(draw: st.DrawFn) -> Gguf:
    """A well-formed file that says something else: keys and tensors changed, renamed, doubled, removed, moved."""
    made = tiny()
    for _ in range(draw(st.integers(1, 3))):
        change = draw(st.sampled_from(_CHANGES))
        made = change(draw, made)
    return made


def _other_value(draw: st.DrawFn, made: Gguf) -> Gguf:
    if not made.keys:
        return made
    key, old = draw(st.sampled_from(made.keys))
    choices = [values, st.none()]
    if isinstance(old.value, int) and not isinstance(old.value, bool):
        choices.append(around(old.value).map(lambda new: Value(GGUFValueType.UINT64, new % 2**64)))
    if isinstance(old.value, list):
        choices.append(_other_items(old))
    return made.with_key(key, draw(st.one_of(choices)))


@st.composite
def _other_items(draw: st.DrawFn, old: Value) -> Value:
    assert isinstance(old.value, list)
    items = list(old.value)
    at = draw(st.integers(0, len(items))) if items else 0
    match draw(st.sampled_from(["cut", "double", "swap", "change"])):
        case "cut":
            del items[at : at + draw(st.integers(1, 300))]
        case "double":
            items[at:at] = items[at : at + 3]
        case "swap":
            items[at : at + 2] = items[at : at + 2][::-1]
        case _:
            new = draw(names if old.type is GGUFValueType.STRING else st.integers(-(2**31), 2**31 - 1))
            if old.type in (GGUFValueType.STRING, GGUFValueType.INT32):
                items[at : at + 1] = [new]
    return Value(old.type, items)


def _new_key(draw: st.DrawFn, made: Gguf) -> Gguf:
    return replace(made, keys=(*made.keys, (draw(names), draw(values))))


def _doubled_key(draw: st.DrawFn, made: Gguf) -> Gguf:
    return replace(made, keys=(*made.keys, draw(st.sampled_from(made.keys)))) if made.keys else made


def _other_tensor(draw: st.DrawFn, made: Gguf) -> Gguf:
    if not made.tensors:
        return made
    at = draw(st.integers(0, len(made.tensors) - 1))
    tensor = made.tensors[at]
    new: tuple[Tensor, ...]
    match draw(st.sampled_from(["dims", "type", "offset", "name", "data", "gone", "twice", "bytes"])):
        case "dims":
            dims = draw(st.lists(st.sampled_from((32, *tensor.dims)).flatmap(around), min_size=0, max_size=5))
            new = (replace(tensor, dims=tuple(dims)),)
        case "type":
            new = (replace(tensor, type=draw(st.integers(0, 45) | extremes.map(lambda value: value % 2**32))),)
        case "offset":
            new = (replace(tensor, offset=draw(extremes)),)
        case "name":
            new = (replace(tensor, name=draw(names | st.sampled_from([other.name for other in made.tensors]))),)
        case "data":
            new = (replace(tensor, data=tensor.data[: draw(st.integers(0, len(tensor.data)))]),)
        case "bytes":
            fill = draw(st.sampled_from([b"\xff", b"\x00\x7c", b"\x00\x7e", b"\x00\x00\x80\x7f"]))
            new = (replace(tensor, data=(fill * len(tensor.data))[: len(tensor.data)]),)
        case "gone":
            new = ()
        case _:
            new = (tensor, tensor)
    return replace(made, tensors=(*made.tensors[:at], *new, *made.tensors[at + 1 :]))


def _other_alignment(draw: st.DrawFn, made: Gguf) -> Gguf:
    alignment = draw(st.sampled_from([0, 1, 8, 16, 24, 64, 4096, 2**31, 2**32 - 1]))
    said = made.with_key("general.alignment", Value(GGUFValueType.UINT32, alignment))
    return replace(said, alignment=alignment) if 0 < alignment <= 4096 and draw(st.booleans()) else said


_CHANGES: tuple[Callable[[st.DrawFn, Gguf], Gguf], ...] = (
    _other_value,
    _other_value,
    _other_value,
    _other_tensor,
    _other_tensor,
    _new_key,
    _doubled_key,
    _other_alignment,
)
