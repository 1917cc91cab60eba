from __future__ import annotations

import pytest

from engine.errors import MAX_MESSAGE_CHARS, FormatError, ModelError, SourceError, UnsupportedModelError


@pytest.mark.parametrize("kind", [FormatError, ModelError, SourceError, UnsupportedModelError])
def test_what_is_quoted_of_a_checkpoint_is_cut(kind: type[ModelError]) -> None:
    assert str(kind("x" * MAX_MESSAGE_CHARS)) == "x" * MAX_MESSAGE_CHARS
    assert str(kind("x" * 10_000_000)) == "x" * (MAX_MESSAGE_CHARS - 3) + "..."


def test_a_format_error_says_where() -> None:
    error = FormatError("x" * 10_000, path="m.gguf", offset=7)
    assert str(error).startswith("m.gguf at byte 7: xxx")
    assert (error.path, error.offset, len(str(error))) == ("m.gguf", 7, MAX_MESSAGE_CHARS)
