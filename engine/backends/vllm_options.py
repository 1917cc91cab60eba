"""What vLLM is told at its start: our settings in its words, and its own arguments, which it checks itself."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

MISSING = (
    "--engine vllm needs vLLM, which is not installed here: pip install 'seraph-serve[vllm]' brings its GPU build "
    "(some 10 GB). For CPUs there is --engine native."
)

OURS = frozenset(
    {
        "model",
        "tokenizer",
        "served-model-name",
        "runner",
        "max-model-len",
        "max-num-seqs",
        "max-num-batched-tokens",
        "tensor-parallel-size",
        "pipeline-parallel-size",
        "kv-cache-memory-bytes",
        "enable-prefix-caching",
        "scheduling-policy",
        "max-logprobs",
        "disable-log-stats",
    }
)
"""Arguments of vLLM's that settings of ours decide on, or that we rely on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """One model for vLLM. None: as vLLM would have it."""

    folder: Path  # config.json, safetensors, the tokenizer
    model: str  # its name in requests
    pooling: bool = False  # it makes vectors, not text
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    kv_cache_bytes: int | None = None
    enable_prefix_caching: bool = True
    arguments: tuple[tuple[str, str], ...] = ()  # vLLM's own, as --vllm-arg KEY=VALUE gives them

    def command_line(self) -> list[str]:
        """As vLLM's own server would be given them. Raises ConfigError for an argument that is ours to give."""
        words = [f"--model={self.folder}", f"--runner={'pooling' if self.pooling else 'generate'}"]
        words.append(f"--served-model-name={self.model}")  # of its metrics
        for name, value in (
            ("max-model-len", self.max_model_len),
            ("max-num-seqs", self.max_num_seqs),
            ("max-num-batched-tokens", self.max_num_batched_tokens),
            ("tensor-parallel-size", self.tensor_parallel_size),
            ("pipeline-parallel-size", self.pipeline_parallel_size),
            ("kv-cache-memory-bytes", self.kv_cache_bytes),
        ):
            if value is not None:
                words.append(f"--{name}={value}")
        words.append("--scheduling-policy=priority")
        if not self.pooling:
            words += [
                "--enable-prefix-caching" if self.enable_prefix_caching else "--no-enable-prefix-caching",
                "--structured-outputs-config.backend=guidance",
            ]
        for key, given in self.arguments:
            name = key.strip().lstrip("-").replace("_", "-")
            if name in OURS:
                raise ConfigError(f"--vllm-arg {key}: Seraph has a setting for it, or decides on it: leave it out.")
            match given.strip().lower():
                case "true" | "":
                    words.append(f"--{name}")
                case "false":
                    words.append(f"--no-{name}")
                case _:
                    words.append(f"--{name}={given}")
        return words


def is_installed() -> bool:
    """Whether there is a vLLM to import. Imports nothing."""
    return importlib.util.find_spec("vllm") is not None


def engine_config(options: VllmOptions) -> VllmConfig:
    """vLLM's own configuration of a model. Imports vLLM, which takes seconds.

    Raises ConfigError with vLLM's reason for whatever it does not accept.
    """
    from vllm.usage.usage_lib import UsageContext

    args = _parse(options)
    try:
        return args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    except Exception as error:  # of vLLM's, of transformers' and of pydantic's: it tells a wrong option by any of them
        raise ConfigError(f"vLLM does not take {options.model}: {reason_of(error)}") from error


def _parse(options: VllmOptions) -> AsyncEngineArgs:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            raise ConfigError(f"vLLM does not take --vllm-arg: {message}.")

    parser = Parser(add_help=False, allow_abbrev=False)
    try:
        parsed = AsyncEngineArgs.add_cli_args(parser).parse_args(options.command_line())
        return AsyncEngineArgs.from_cli_args(parsed)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"vLLM does not take its arguments: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The first thing that an error of vLLM's says, on one line; what it advises in further paragraphs is left out."""
    text = str(error)
    errors = getattr(error, "errors", None)
    if callable(errors) and (said := errors()):  # pydantic's
        text = str(said[0].get("msg", "")).removeprefix("Value error, ")
    first, _, _ = text.strip().partition("\n\n")
    return " ".join(first.split())[:1000] or type(error).__name__
