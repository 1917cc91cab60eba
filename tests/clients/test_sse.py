from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seraph_client.errors import ProtocolError
from seraph_client.sse import MAX_EVENT_BYTES, EventDecoder


def decode(*pieces: bytes) -> list[str]:
    decoder = EventDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\n\ndata:  b\n\n", ["a", " b"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", ["a", "b", "c"]),
        (b": keep-alive\n\n: another\n\ndata: a\n\n", ["a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\nunknown\n\n", ["a"]),
        (b"data\ndata:\n\n", ["\n"]),
        (b"data: \xc3\xa9\xf0\x9f\x99\x82\n\n", ["é🙂"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"data: cut short\n", []),
        (b"data: \xff\n\n", ["\ufffd"]),
        (b"\n\n\n", []),
    ],
)
def test_events(stream: bytes, events: list[str]) -> None:
    assert decode(stream) == events
    assert decode(*(stream[i : i + 1] for i in range(len(stream)))) == events


@given(
    st.lists(
        st.sampled_from([b"data: x\n", b"data: \xf0\x9f\x99\x82\r\n", b": c\r", b"\n", b"\r\n", b"\r", b"id: 1\n"])
    ),
    st.lists(st.integers(0, 60)),
)
def test_how_the_bytes_are_split_changes_nothing(lines: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(lines)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    assert decode(*(stream[a:b] for a, b in pairwise(edges))) == decode(stream)


def test_an_event_without_end_is_refused() -> None:
    decoder = EventDecoder()
    with pytest.raises(ProtocolError, match="longer than"):
        for _ in range(MAX_EVENT_BYTES // 65536 + 2):
            decoder.feed(b"x" * 65536)


def test_keep_alives_may_go_on_for_ever() -> None:
    decoder = EventDecoder()
    comment = b":" + b" " * 65534 + b"\n"
    for _ in range(2 * MAX_EVENT_BYTES // len(comment)):
        assert decoder.feed(comment) == []
    assert decoder.feed(b"data: a\n\n") == ["a"]
