"""Every exception Seraph raises on purpose.

SeraphError
├── ConfigError                 a setting has a value that cannot work
├── ModelError                  a checkpoint cannot be used
│   ├── SourceError             it could not be found, fetched or verified
│   ├── FormatError             a file is malformed (carries the path and, where known, the offset)
│   └── UnsupportedModelError   well formed, but asks for something we do not implement
├── RequestError                the caller's request is wrong (carries the parameter's name)
│   └── ContextLengthError      prompt (plus what must fit after it) exceeds the model's context
└── EngineError                 the engine failed a correct request
    ├── EngineDeadError         the engine process died while it held the request
    ├── StalledRankError        a thread of a tensor-parallel rank makes no progress: the engine cannot go on
    └── EngineOverloadedError   no room now; try again later

Foreign errors are mapped onto these where they enter; `server/errors.py` maps these onto HTTP.
"""

from __future__ import annotations

from pathlib import Path


class SeraphError(Exception):
    """Base of everything Seraph raises on purpose."""


class ConfigError(SeraphError):
    """A setting has a value that cannot work; the message names the key, the value and what is allowed."""


MAX_MESSAGE_CHARS = 1000
"""Of what is said about a checkpoint: messages quote it, and what they quote may be a megabyte."""


class ModelError(SeraphError):
    """A checkpoint cannot be used."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 3] + "...")


class SourceError(ModelError):
    """A checkpoint could not be found, fetched or verified."""


class FormatError(ModelError):
    """A file is malformed.

    `path` is the file, `offset` the byte where reading stopped making sense (None where it has no single place).
    """

    def __init__(self, message: str, *, path: Path | str | None = None, offset: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if offset is None else f"{path} at byte {offset}: "
        super().__init__(where + message)
        self.path = path
        self.offset = offset


class UnsupportedModelError(ModelError):
    """A well-formed checkpoint asks for something this engine does not implement."""


class RequestError(SeraphError):
    """The caller's request is wrong. `param` names the offending field, `code` is the API's error code."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context."""

    def __init__(self, *, max_model_len: int, num_tokens: int, param: str = "messages") -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, and the prompt has {num_tokens}: "
            "at least one token must be left for the answer. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
        self.max_model_len = max_model_len
        self.num_tokens = num_tokens


class EngineError(SeraphError):
    """The engine failed a correct request."""


class EngineDeadError(EngineError):
    """The engine process died while it held the request."""


class StalledRankError(EngineError):
    """A thread of the engine has stalled or died in the middle of its work, and may still write where it wrote.

    `rank` and `thread` (of the rank's) are None where it crossed from another process, as are `phase`, which waits for
    it, and `seconds`, for how long it made no progress.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        thread: int | None = None,
        phase: str | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.thread = thread
        self.phase = phase
        self.seconds = seconds


class EngineOverloadedError(EngineError):
    """The engine has no room for the request now; `retry_after` seconds is a fair time to wait."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after
