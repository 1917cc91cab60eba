"""JSON documents (and msgpack, which holds the same): one value changed, the rest in order."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_numbers = st.sampled_from([0, 1, -1, 2, 3, 31, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.5, 1e308])
_texts = st.text(max_size=6) | st.sampled_from(
    ["", "\0", "a" * 3000, "<|im_end|>", "../x", "model.safetensors", "\U0001f600"]
)
_leaves = st.none() | st.booleans() | _numbers | st.floats() | _texts
values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3), max_leaves=4
)
"""Values of every kind, NaN and numbers of any size among them."""


@st.composite
def changed(draw: st.DrawFn, base: Any) -> Any:
    """A copy of `base` with one to three of its values replaced, removed, renamed, doubled or moved."""
    made = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(made))
        if not places:
            return draw(values)
        where, key = draw(st.sampled_from(places))
        old = where[key]
        change = draw(st.sampled_from(["replace", "replace", "near", "remove", "double", "rename", "move", "nest"]))
        if change == "near" and isinstance(old, int | float) and not isinstance(old, bool):
            where[key] = draw(st.sampled_from([old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old)]))
        elif change == "near" and isinstance(old, str):
            where[key] = draw(st.sampled_from([old + "x", old[:-1], old.upper(), old * 50, [old], {"content": old}]))
        elif change == "remove":
            del where[key]
        elif change == "double" and isinstance(where, list):
            where.insert(key, old)
        elif change == "rename" and isinstance(where, dict):
            where[draw(_texts)] = where.pop(key)
        elif change == "move":
            other, at = draw(st.sampled_from(places))
            where[key] = copy.deepcopy(other[at])
        elif change == "nest":
            where[key] = draw(st.sampled_from([[old], {"type": "Sequence", "decoders": [old]}, [[[[old]]]]]))
        else:
            where[key] = draw(values)
    return made


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Containers within `value` and their keys; of a long one, the first and the last ones."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) <= 24 else keys[:8] + keys[-4:]:
        yield value, key
        if isinstance(value[key], dict | list) and depth < 12:
            yield from _places(value[key], depth + 1)


def encoded(value: Any) -> bytes:
    """As JSON; lone surrogates and NaN as Python writes them."""
    return json.dumps(value).encode()
