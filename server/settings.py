"""Every setting of the server: flag, environment name, default and help in one declaration each.

A flag beats the environment, which beats the default. This is the only module of `server` that reads the environment.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import DEFAULT_MODEL, ISAS, EngineConfig
from engine.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")
OTHER_NAMES = frozenset({"SERAPH_HOME"})
"""Environment names read by `engine.config`, which has no flag for them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a setting's text becomes its value. `parse` raises ValueError; `allowed` completes "must be ..."."""

    allowed: str
    parse: Callable[[str], Any]
    metavar: str


@dataclass(frozen=True, slots=True)
class Option:
    """One setting as the command line and the environment see it."""

    name: str  # the field of Settings
    help: str
    kind: Kind
    default: Any
    repeatable: bool = False
    positional: bool = False
    secret: bool = False  # its value appears in no message

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def environment_name(self) -> str:
        return "SERAPH_" + self.name.upper()

    @property
    def is_switch(self) -> bool:
        return self.kind is SWITCH


def _switch(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _nonempty(text: str) -> str:
    if not text.strip():
        raise ValueError(text)
    return text


def _choice(*choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Kind("one of " + ", ".join(choices), parse, "|".join(choices))


def _integer(low: int, high: int, what: str = "N") -> Kind:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return Kind(f"a whole number between {low} and {high}", parse, what)


def _seconds(low: float, high: float) -> Kind:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # written so that NaN fails it
            raise ValueError(text)
        return value

    return Kind(f"a number of seconds between {low:g} and {high:g}", parse, "SECONDS")


def _file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(text)
    return path


SWITCH = Kind("true or false", _switch, "")
TEXT = Kind("a text that is not empty", _nonempty, "TEXT")
FILE = Kind("the path of an existing file", _file, "FILE")


def option(
    default: Any,
    help: str,
    kind: Kind,
    *,
    repeatable: bool = False,
    positional: bool = False,
    secret: bool = False,
) -> Any:
    """A dataclass field that carries its whole declaration."""
    declared = {
        "help": help,
        "kind": kind,
        "default": default,
        "repeatable": repeatable,
        "positional": positional,
        "secret": secret,
    }
    return dataclasses.field(default=default, metadata=declared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything `seraph serve` is told. Raises ConfigError where values do not go together."""

    model: str = option(DEFAULT_MODEL, "Model to serve: an alias of the catalogue or a source.", TEXT, positional=True)
    host: str = option("127.0.0.1", "Address to listen on.", TEXT)
    port: int = option(8000, "Port to listen on; 0 takes any free one.", _integer(0, 65535, "PORT"))
    api_key: tuple[str, ...] = option(
        (), "Key that callers must send (Bearer or x-api-key). Repeatable.", TEXT, repeatable=True, secret=True
    )
    insecure: bool = option(False, "Allow listening beyond loopback without a key.", SWITCH)
    served_model_name: tuple[str, ...] = option(
        (), "Model name in the API; the first is the one answers carry. Repeatable.", TEXT, repeatable=True
    )
    chat_template: Path | None = option(  # noqa: RUF009  # a field, as every other
        None, "File with a chat template to use instead of the model's.", FILE
    )
    max_model_len: int | None = option(
        None, "Longest context in tokens; by default the model's own, within the KV cache.", _integer(2, 1 << 24)
    )
    max_num_seqs: int = option(64, "Most requests computed in one step.", _integer(1, 1024))
    max_num_batched_tokens: int = option(512, "Most tokens computed in one step.", _integer(1, 65536))
    kv_cache_tokens: int = option(16384, "Tokens of KV memory over all requests.", _integer(64, 1 << 28))
    threads: int = option(0, "Threads of the engine; 0: every CPU this process may use.", _integer(0, 1024))
    isa: str = option("auto", "Instruction set of the kernels.", _choice("auto", *ISAS))
    prefix_caching: bool = option(True, "Reuse the KV blocks of shared prompt prefixes.", SWITCH)
    strict_fields: bool = option(
        False, "Refuse request fields that no known API has, instead of reporting them.", SWITCH
    )
    cors_origin: tuple[str, ...] = option(
        (), "Origin that browsers may call from, or *. Repeatable; none by default.", TEXT, repeatable=True
    )
    allowed_host: tuple[str, ...] = option(
        (), "Further Host header to accept on a loopback address, or *. Repeatable.", TEXT, repeatable=True
    )
    max_body_bytes: int = option(4 << 20, "Largest request body in bytes.", _integer(1024, 1 << 30, "BYTES"))
    max_waiting: int = option(
        512, "Sequences that may wait beyond max-num-seqs before callers get 503.", _integer(0, 1 << 20)
    )
    default_max_tokens: int | None = option(
        None, "max_tokens of requests that name none; by default what the context leaves.", _integer(1, 1 << 24)
    )
    keep_alive_interval: float = option(
        15.0, "Silence on a stream after which a keep-alive comment is sent.", _seconds(0.05, 3600)
    )
    body_timeout: float = option(
        60.0, "Time a caller has to deliver its headers, and again its body.", _seconds(0.05, 3600)
    )
    send_timeout: float = option(
        60.0,
        "Time a caller may be unreachable, or take nothing of its answer, before it is cut off.",
        _seconds(1, 3600),
    )
    drain_timeout: float = option(30.0, "Time that running requests have to finish after SIGTERM.", _seconds(0, 3600))
    log_level: str = option("info", "Least severe messages to log.", _choice(*LOG_LEVELS))

    def __post_init__(self) -> None:
        if not (self.api_key or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: set a key with --api-key or SERAPH_API_KEY, "
                "or pass --insecure to let everyone in."
            )

    def engine_config(self) -> EngineConfig:
        """The part of the settings that the engine is told. Raises ConfigError."""
        return EngineConfig(
            model=self.model,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_tokens=self.kv_cache_tokens,
            enable_prefix_caching=self.prefix_caching,
            threads=self.threads,
            isa=self.isa,
        )

    def chat_template_source(self) -> str | None:
        """The operator's chat template, None where the model's is wanted. Raises ConfigError."""
        if self.chat_template is None:
            return None
        try:
            return self.chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {self.chat_template} cannot be read: {error}.") from None

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names the API knows the model by: `served_model_name`, else the last part of the source."""
        return self.served_model_name or (self.model.rstrip("/").rsplit("/", 1)[-1],)


def options() -> Iterator[Option]:
    """Every setting's declaration, in the order of the help text."""
    for field in dataclasses.fields(Settings):
        yield Option(name=field.name, **field.metadata)


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags (None or () stands for "not given"), then the environment, then defaults.

    Flags and environment hold text, except that switches among the flags are bool. A repeatable setting's environment
    value is split at commas. Raises ConfigError naming the key, the value (unless secret) and what is allowed.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for declared in options():
        given = flags.get(declared.name)
        from_environment = environment.get(declared.environment_name, "")
        if given is not None and given != ():
            values[declared.name] = _parse(declared, declared.flag, given)
        elif from_environment:
            parts: Any = from_environment
            if declared.repeatable:
                parts = [part.strip() for part in from_environment.split(",") if part.strip()]
            values[declared.name] = _parse(declared, declared.environment_name, parts)
    return Settings(**values)


def unknown_environment(environment: Mapping[str, str] | None = None) -> list[str]:
    """SERAPH_ names in the environment that mean nothing: most likely misspelled."""
    known = {declared.environment_name for declared in options()} | OTHER_NAMES
    names = os.environ if environment is None else environment
    return sorted(name for name in names if name.startswith("SERAPH_") and name not in known)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parse(declared: Option, key: str, given: Any) -> Any:
    if declared.repeatable:
        return tuple(_parse_one(declared, key, part) for part in given)
    return given if isinstance(given, bool) else _parse_one(declared, key, given)


def _parse_one(declared: Option, key: str, text: str) -> Any:
    try:
        return declared.kind.parse(text)
    except ValueError:
        got = "another value" if declared.secret else repr(text)
        raise ConfigError(f"{key} must be {declared.kind.allowed}, got {got}.") from None


def version() -> str:
    """The installed version of Seraph; "0+source" where it runs from a checkout that is not installed."""
    from importlib import metadata  # slow to import, and not needed to start

    try:
        return metadata.version("seraph-serve")
    except metadata.PackageNotFoundError:
        return "0+source"
