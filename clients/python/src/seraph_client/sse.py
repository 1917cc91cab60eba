"""Server-sent events from a stream of bytes (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

from seraph_client.errors import ProtocolError

MAX_EVENT_BYTES = 16 << 20
"""Where no event ends, the server is none of ours; its bytes must not fill the memory."""


class EventDecoder:
    """Takes bytes as they come and gives the data of each event once it is complete.

    Lines may end in LF, CRLF or CR and be split anywhere. Comments (keep-alives) and fields other than data are
    skipped. An event that the stream's end cuts short is dropped, as the standard has it.
    """

    def __init__(self) -> None:
        self._line = bytearray()  # of the line that has not ended
        self._data: list[bytes] = []  # of the event that has not ended
        self._num_bytes = 0  # of both
        self._after_cr = False  # a LF now belongs to the line end before it
        self._at_start = True

    def feed(self, received: bytes) -> list[str]:
        """The data of the events that `received` completes. Raises ProtocolError for one that is too long."""
        if self._after_cr and received[:1] == b"\n":
            received = received[1:]
            self._after_cr = False
        if not received:
            return []
        self._after_cr = received[-1:] == b"\r"
        self._num_bytes += len(received)
        events: list[str] = []
        *lines, rest = received.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            self._line += line
            self._take_line(bytes(self._line), events)
            self._line.clear()
        self._line += rest
        if events:
            self._num_bytes = len(rest)
        if self._num_bytes > MAX_EVENT_BYTES:
            raise ProtocolError(f"An event of the stream is longer than {MAX_EVENT_BYTES} bytes.")
        return events

    def _take_line(self, line: bytes, events: list[str]) -> None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
            self._data.clear()
            return
        if line.startswith(b":"):
            self._num_bytes -= min(self._num_bytes, len(line) + 1)  # keep-alives may go on for ever
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value.removeprefix(b" "))
