"""Every setting of the server: flag, environment name, key in a file, default and help in one declaration each.

A flag beats the environment, which beats the configuration file, which beats the default. This is the only module of
`server` that reads the environment.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backends.vllm_options import VllmOptions, is_installed
from engine.config import (
    AUTO_KV_SHARE,
    AUTO_KV_TOKENS,
    BLOCK_SIZE,
    DEFAULT_MODEL,
    HUGE_PAGES,
    HUGE_PAGES_SHARE,
    ISAS,
    KV_DTYPES,
    MIN_KV_TOKENS,
    QUANTIZATIONS,
    SPECULATIONS,
    EngineConfig,
    has_gpu,
)
from engine.errors import ConfigError, FormatError, SourceError
from engine.features import ENGINES
from engine.logs import FORMATS, LEVELS
from server import config_file
from server.options import (
    FILE,
    GENERATION,
    MEMORY,
    SOURCE,
    SWITCH,
    TEXT,
    GenerationConfig,
    Option,
    choice,
    integer,
    nearest,
    option,
    seconds,
)

OTHER_NAMES = frozenset({"SERAPH_HOME"})
"""Environment names read by `engine.config`, which has no flag for them."""

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, VLLM_MAX_NUM_SEQS = 64, 512, 256
NATIVE_ONLY = frozenset(
    {
        "embedding_model",
        "kv_cache_tokens",
        "kv_cache_dtype",
        "speculation",
        "huge_pages",
        "threads",
        "stall_timeout",
        "isa",
    }
)
VLLM_ONLY = frozenset({"vllm_arg", "pipeline_parallel_size"})
"""Settings that one engine alone has."""

MODEL, ACCESS, MEMORY_GROUP, BATCHES, MACHINE, REQUESTS, RUNNING = (
    "Model",
    "Network and access",
    "Context and memory",
    "Batches and queue",
    "Machine",
    "Requests",
    "Configuration and logs",
)
MAX_TOKENS = 1 << 28
FORMATS_OF_TOOLS = ("hermes", "llama3_json", "mistral", "mistral_v11", "phi4_mini", "qwen3_coder", "generic")
"""engine.text.tool_formats.FORMATS, which would be slow to import."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything `seraph serve` is told. Raises ConfigError where values do not go together."""

    model: tuple[str, ...] = option(
        (DEFAULT_MODEL,),
        "Models to serve, each an alias of the catalogue or a source. The settings below count for every one of them.",
        SOURCE,
        MODEL,
        positional=True,
        repeatable=True,
    )
    embedding_model: str | None = option(
        None,
        "Model for embeddings, an encoder; it shares the process and the threads of the first model, which goes first.",
        SOURCE,
        MODEL,
    )
    engine: str = option(
        "auto",
        "What computes: our own engine for CPUs (native), or vLLM, for GPUs and for models that one machine cannot "
        "hold; auto: vllm where it is installed and there is a GPU.",
        choice("auto", *ENGINES),
        MODEL,
    )
    vllm_arg: tuple[str, ...] = option(
        (),
        "Argument of vLLM's own, as KEY=VALUE, which vLLM checks: --vllm-arg enforce-eager=true. Repeatable.",
        TEXT,
        MODEL,
        repeatable=True,
    )
    quantization: str = option(
        "auto",
        "What becomes of float weights: none computes with bfloat16, int8 and int4 pack them; auto is as the catalogue "
        "says of a model, else as none. A quantized checkpoint keeps its own.",
        choice("auto", *QUANTIZATIONS),
        MODEL,
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Names of the model in the API, several after one flag; of several models one each, in their order; by default "
        "the alias or the source's last part.",
        TEXT,
        MODEL,
        repeatable=True,
        greedy=True,
    )
    chat_template: Path | None = option(  # noqa: RUF009  # a field, as every other
        None, "File with a chat template to use instead of the model's.", FILE, MODEL
    )
    tool_format: str = option(
        "auto",
        "How the model writes calls of tools; auto: as its chat template shows, and as we describe it to the model "
        "(generic) where that shows none.",
        choice("auto", *FORMATS_OF_TOOLS),
        MODEL,
    )
    generation_config: str | GenerationConfig = option(  # noqa: RUF009
        "auto",
        "How requests are sampled where they do not say it themselves: as the checkpoint and the catalogue say (auto), "
        "by the API's plain defaults (none), or by a generation_config.json, a folder with one, or a JSON object.",
        GENERATION,
        MODEL,
    )
    default_max_tokens: int | None = option(
        None,
        "max_tokens of requests that name none.",
        integer(1, MAX_TOKENS),
        MODEL,
        shown_default="the generation config's, else what the context leaves (completions: 16)",
    )

    host: str = option("127.0.0.1", "Address to listen on.", TEXT, ACCESS)
    port: int = option(8000, "Port to listen on; 0 takes any free one.", integer(0, 65535, "PORT"), ACCESS)
    api_key: tuple[str, ...] = option(
        (), "Key that callers must send (Bearer or x-api-key). Repeatable.", TEXT, ACCESS, repeatable=True, secret=True
    )
    admin_key: tuple[str, ...] = option(
        (),
        "Key that opens /admin, which loads and unloads models; without one it is closed. Repeatable.",
        TEXT,
        ACCESS,
        repeatable=True,
        secret=True,
    )
    allow_remote_load: bool = option(
        False,
        "Let /admin load what is not in the catalogue too: any source, files and folders of this machine among them.",
        SWITCH,
        ACCESS,
    )
    insecure: bool = option(False, "Allow listening beyond loopback without a key.", SWITCH, ACCESS)
    allowed_host: tuple[str, ...] = option(
        (), "Further Host header to accept on a loopback address, or *. Repeatable.", TEXT, ACCESS, repeatable=True
    )
    cors_origin: tuple[str, ...] = option(
        (), "Origin that browsers may call from, or *. Repeatable; none by default.", TEXT, ACCESS, repeatable=True
    )

    max_model_len: int | None = option(
        None,
        "Longest context in tokens, prompt and answer together.",
        integer(2, MAX_TOKENS),
        MEMORY_GROUP,
        shown_default="the model's own, or what the KV cache holds if that is less",
    )
    kv_cache_memory: str | None = option(
        None,
        "Memory for keys and values of all requests, as 2GiB; 25% is of what the machine and the cgroup give. Several "
        "models get equal shares of it.",
        MEMORY,
        MEMORY_GROUP,
        shown_default=f"{AUTO_KV_TOKENS} tokens or max-model-len, whichever is more, as far as {AUTO_KV_SHARE:.0%} "
        "of the memory goes",
    )
    kv_cache_tokens: int | None = option(
        None,
        f"The same exactly, as a number of tokens of each model (in blocks of {BLOCK_SIZE}); not together with "
        "kv-cache-memory.",
        integer(MIN_KV_TOKENS, MAX_TOKENS),
        MEMORY_GROUP,
    )
    kv_cache_dtype: str = option(
        "bf16",
        "What keys and values are kept in: int8 takes half the memory of bf16 and reads long contexts faster.",
        choice(*KV_DTYPES),
        MEMORY_GROUP,
    )
    prefix_caching: bool = option(True, "Reuse the KV blocks of shared prompt prefixes.", SWITCH, MEMORY_GROUP)

    speculation: str = option(
        "prompt-lookup",
        "Guess following tokens from the text so far and compute them along: the same answers, sooner where text "
        "repeats itself. It stops by itself where it does not pay.",
        choice(*SPECULATIONS),
        BATCHES,
    )
    max_num_seqs: int | None = option(
        None,
        "Most requests computed in one step.",
        integer(1, 1024),
        BATCHES,
        shown_default=f"{MAX_NUM_SEQS}; vLLM: {VLLM_MAX_NUM_SEQS}",
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Most tokens computed in one step; at least max-num-seqs.",
        integer(1, 65536),
        BATCHES,
        shown_default=f"{MAX_NUM_BATCHED_TOKENS}; vLLM: as it decides",
    )
    max_waiting: int = option(
        512, "Sequences that may wait beyond max-num-seqs before callers get 503.", integer(0, 1 << 20), BATCHES
    )

    huge_pages: str = option(
        "auto",
        "Copy the weights into huge pages of this process's own: some 7% faster, but no longer shared with other "
        f"servers; auto: where they take at most {HUGE_PAGES_SHARE:.1%} of the memory.",
        choice(*HUGE_PAGES),
        MACHINE,
    )
    threads: int = option(
        0, "Threads of each model's engine; 0: every CPU this process may use.", integer(0, 1024), MACHINE
    )
    tensor_parallel_size: int | None = option(
        None,
        "Ranks that the threads form; each computes its part of every projection and holds its part of the KV cache, "
        "on CPUs of its own. At most the model's query heads. vLLM: GPUs that share every layer.",
        integer(1, 1024, "RANKS"),
        MACHINE,
        shown_default="one for each NUMA node; vLLM: 1",
    )
    pipeline_parallel_size: int = option(
        1, "Of vLLM: groups of GPUs, or of machines, that have some of the layers each.", integer(1, 1024), MACHINE
    )
    stall_timeout: float = option(
        10.0,
        "Time that a step waits for a thread of the engine that makes no progress, before the engine is started anew.",
        seconds(0.01, 3600),
        MACHINE,
    )
    isa: str = option("auto", "Instruction set of the kernels.", choice("auto", *ISAS), MACHINE)

    max_body_bytes: int = option(4 << 20, "Largest request body in bytes.", integer(1024, 1 << 30, "BYTES"), REQUESTS)
    strict_fields: bool = option(
        False, "Refuse request fields that no known API has, instead of reporting them.", SWITCH, REQUESTS
    )
    body_timeout: float = option(
        60.0, "Time a caller has to deliver its headers, and again its body.", seconds(0.05, 3600), REQUESTS
    )
    send_timeout: float = option(
        60.0,
        "Time a caller may be unreachable, or take nothing of its answer, before it is cut off.",
        seconds(1, 3600),
        REQUESTS,
    )
    keep_alive_interval: float = option(
        15.0, "Silence on a stream after which a keep-alive comment is sent.", seconds(0.05, 3600), REQUESTS
    )
    drain_timeout: float = option(
        30.0, "Time that running requests have to finish after SIGTERM.", seconds(0, 3600), REQUESTS
    )

    config: Path | None = option(  # noqa: RUF009
        None, "TOML file with settings; flags and the environment beat it.", FILE, RUNNING, in_file=False
    )
    log_level: str = option(
        "info",
        "Least severe messages to log; debug shows what each step of the engine computes.",
        choice(*LEVELS),
        RUNNING,
        environment="SERAPH_LOG",
    )
    log_format: str = option("text", "How log lines look.", choice(*FORMATS), RUNNING)

    def __post_init__(self) -> None:
        if not (self.api_key or self.insecure or is_loopback(self.host)):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: set a key with --api-key or SERAPH_API_KEY, "
                "or pass --insecure to let everyone in."
            )
        if not self.model:
            raise ConfigError("model must name at least one model.")
        if set(self.admin_key) & set(self.api_key):
            raise ConfigError("--admin-key and --api-key must differ: callers must not be able to unload models.")
        self.model_names  # noqa: B018  # that they can be told apart is known before anything is fetched

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM computes. Imports nothing."""
        return self.engine == "vllm" or (self.engine == "auto" and has_gpu() and is_installed())

    @property
    def engine_name(self) -> str:
        """The one of ENGINES that computes."""
        return "vllm" if self.uses_vllm else "native"

    @property
    def max_running(self) -> int:
        """Requests that an engine computes at once."""
        return self.max_num_seqs or (VLLM_MAX_NUM_SEQS if self.uses_vllm else MAX_NUM_SEQS)

    def vllm_options(self, folder: Path, model: str, *, pooling: bool, kv_cache_bytes: int | None) -> VllmOptions:
        """What vLLM is told of a model. Raises ConfigError."""
        arguments = []
        for given in self.vllm_arg:
            key, equals, value = given.partition("=")
            if not key.strip() or not equals:
                raise ConfigError(f"--vllm-arg must be KEY=VALUE, got {given!r}.")
            arguments.append((key, value))
        return VllmOptions(
            folder=folder,
            model=model,
            pooling=pooling,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            tensor_parallel_size=self.tensor_parallel_size or 1,
            pipeline_parallel_size=self.pipeline_parallel_size,
            kv_cache_bytes=kv_cache_bytes,
            enable_prefix_caching=self.prefix_caching,
            arguments=tuple(arguments),
        )

    def need_one_engine(self) -> None:
        """Raises ConfigError for a setting of the engine that is not the one that computes."""
        others = NATIVE_ONLY if self.uses_vllm else VLLM_ONLY
        if self.uses_vllm and self.quantization not in ("auto", "none"):
            raise ConfigError(
                f"--quantization {self.quantization} is not for --engine vllm, which packs no float weights itself: "
                "serve a quantized checkpoint, or name one of vLLM's own ways, as --vllm-arg quantization=fp8."
            )
        for declared in options():
            if declared.name in others and getattr(self, declared.name) != declared.default:
                raise ConfigError(f"{declared.flag} is not for --engine {self.engine_name}: leave it out.")

    def engine_configs(self) -> list[EngineConfig]:
        """What each model's engine is told, before their memory is divided. Raises ConfigError."""
        configs = [self.engine_config(model) for model in self.model]
        configs[0] = dataclasses.replace(configs[0], embedding_model=self.embedding_model)
        return configs

    def engine_config(self, model: str) -> EngineConfig:
        """The part of the settings that the engine of `model` is told. Raises ConfigError."""
        return EngineConfig(
            model=model,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs or MAX_NUM_SEQS,
            max_num_batched_tokens=self.max_num_batched_tokens or max(MAX_NUM_BATCHED_TOKENS, self.max_num_seqs or 0),
            kv_cache_tokens=self.kv_cache_tokens,
            kv_cache_memory=self.kv_cache_memory,
            kv_cache_dtype=self.kv_cache_dtype,
            enable_prefix_caching=self.prefix_caching,
            speculation=self.speculation,
            quantization=None if self.quantization == "auto" else self.quantization,
            huge_pages=self.huge_pages,
            threads=self.threads,
            tensor_parallel_size=self.tensor_parallel_size,
            stall_timeout=self.stall_timeout,
            isa=self.isa,
        )

    def generation_defaults(self) -> dict[str, float] | None:
        """What requests that leave a sampling field out get for it, by the API's names; None: what the model says.

        Warns of ways of decoding that a given configuration asks for and that we do not have. Raises ConfigError for
        a value that cannot be.
        """
        if not isinstance(self.generation_config, GenerationConfig):
            return None if self.generation_config == "auto" else {}
        from engine.weights.generation import defaults_from_config

        try:
            return defaults_from_config(self.generation_config.values, self.generation_config.where)
        except FormatError as error:
            raise ConfigError(f"--generation-config: {error}.") from None

    def chat_template_source(self) -> str | None:
        """The operator's chat template, None where the model's is wanted. Raises ConfigError."""
        if self.chat_template is None:
            return None
        try:
            return self.chat_template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {self.chat_template} cannot be read: {error}.") from None

    def tool_format_name(self) -> str | None:
        """The operator's format of calls of tools, None where the template tells it."""
        return None if self.tool_format == "auto" else self.tool_format

    @property
    def model_names(self) -> list[tuple[str, ...]]:
        """Names the API knows each model by: `served_model_name`, else the one that its source gives.

        Raises ConfigError where a name would stand for two.
        """
        given, models = self.served_model_name, self.model
        if len(models) == 1:
            names = [given or (name_of(models[0]),)]
        elif not given:
            names = [(name_of(model),) for model in models]
        elif len(given) == len(models):
            names = [(name,) for name in given]
        else:
            raise ConfigError(
                f"--served-model-name must name each of the {len(models)} models once, in their order, "
                f"got {', '.join(given)}."
            )
        if self.embedding_model is not None:
            names.append((name_of(self.embedding_model),))
        taken: set[str] = set()
        for own in names:
            if (twice := taken.intersection(own)) and len(names) > 1:
                raise ConfigError(
                    f"Two models would be called {min(twice)!r}: give each a name of its own, in their order, with "
                    "--served-model-name."
                )
            taken.update(own)
        return names


def options() -> Iterator[Option]:
    """Every setting's declaration, in the order of the help text; a group's settings follow one another."""
    for field in dataclasses.fields(Settings):
        yield Option(name=field.name, **field.metadata)


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags (None or () stands for "not given"), the environment, a configuration file, and defaults.

    Flags and environment hold text, except that switches among the flags are bool. A repeatable setting's environment
    value is split at commas. Raises ConfigError naming the key, the value (unless secret) and what is allowed.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for declared in options():
        given = flags.get(declared.name)
        from_environment = environment.get(declared.environment_name, "")
        if given not in (None, (), []):
            values[declared.name] = _parse(declared, declared.flag, given)
        elif from_environment:
            parts: Any = from_environment
            if declared.repeatable:
                parts = [part.strip() for part in from_environment.split(",") if part.strip()]
                if not parts:  # an empty list would mean "no key"
                    raise declared.wrong(declared.environment_name, from_environment)
            values[declared.name] = _parse(declared, declared.environment_name, parts)
    if (file := values.get("config")) is not None:
        values = {**config_file.read(file, options()), **values}
    return Settings(**values)


def unknown_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """SERAPH_ names in the environment that mean nothing, each with the one that was most likely meant.

    For a name that a flag suggests, as SERAPH_LOG_LEVEL, that is the flag's own.
    """
    known = {declared.environment_name for declared in options()} | OTHER_NAMES
    suggested = {"SERAPH_" + declared.name.upper(): declared.environment_name for declared in options()}
    names = os.environ if environment is None else environment
    return {
        name: suggested.get(name) or nearest(name, sorted(known))
        for name in sorted(names)
        if name.startswith("SERAPH_") and name not in known
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@functools.cache
def name_of(source: str, *, strict: bool = False) -> str:
    """The name that a source gives its model. What is no source names itself, or with `strict` raises SourceError."""
    from engine.weights.source import model_id

    try:
        return model_id(source)
    except SourceError:
        if strict:
            raise
        return source  # for whoever loads it to say


def _parse(declared: Option, key: str, given: Any) -> Any:
    if declared.repeatable:
        return tuple(declared.parse(key, part) for part in given)
    return given if isinstance(given, bool) else declared.parse(key, given)


def version() -> str:
    """The installed version of Seraph; "0+source" where it runs from a checkout that is not installed."""
    from importlib import metadata  # slow to import, and not needed to start

    try:
        return metadata.version("seraph-serve")
    except metadata.PackageNotFoundError:
        return "0+source"
