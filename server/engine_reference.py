"""docs/engines.md, written from what engines declare and the settings: `python -m server.engine_reference`."""

from __future__ import annotations

from collections.abc import Iterable

from engine.features import ENGINES, FEATURES, Feature, Has, Lacks, Of
from server.options import Option
from server.settings import BATCHES, MACHINE, MEMORY_GROUP, MODEL, NATIVE_ONLY, VLLM_ONLY, options

HEAD = """\
# The engines

*This page is written from `engine/features.py` and `server/settings.py` by `make docs`.*

Two engines compute behind the same API: `native`, our own for CPUs, and `vllm`, which is installed beside Seraph, for
GPUs and for models that one machine cannot hold. `--engine` chooses; by itself (`auto`) it is vLLM where that is
installed and there is a GPU. One server has one engine, for all of its models.
[operations.md](operations.md#the-vllm-engine) says how to run vLLM, and what happens when it dies.

What no table here tells apart is the server's and the same over both: routes and fields ([api.md](api.md)), chat
templates, tools and their parsers, stop strings, keys, the queue, streams, logs.
"""

REFUSED = """\
A request that asks for what the engine lacks is answered with 400 and says why:

    {"error": {"message": "The engine of this server (vllm) does not support ...", "type": "invalid_request_error",
               "param": null, "code": "not_supported_by_engine"}}
"""

NAMES = {"native": "native", "vllm": "vLLM"}

DIFFERENCES = {
    "model": ("GGUF files and Hugging Face folders", "folders; GGUF files are converted once"),
    "quantization": ("none, int8 or int4", "none; others are vLLM's own, as `--vllm-arg quantization=fp8`"),
    "max_model_len": (
        "by itself the model's own, or what the KV cache holds if that is less",
        "by itself the model's own; where the KV memory does not hold that, the start fails",
    ),
    "kv_cache_memory": (
        "a size, or a share of the memory",
        "a size; by itself on CPUs a quarter of the memory, on GPUs what vLLM's `gpu-memory-utilization` leaves",
    ),
    "max_num_seqs": ("", "more by itself"),
    "max_num_batched_tokens": ("", "as vLLM decides"),
    "tensor_parallel_size": ("ranks of threads, by itself one for each NUMA node", "GPUs, by itself 1"),
}
"""What a setting of both engines means to each, where that is not the same."""

ENGINE_GROUPS = (MODEL, MEMORY_GROUP, BATCHES, MACHINE)
"""Groups whose settings concern what is computed; the others are the server's own."""


def page() -> str:
    """The whole page."""
    declared = [one for one in options() if one.group in ENGINE_GROUPS]
    of_one = NATIVE_ONLY | VLLM_ONLY
    return "\n".join(
        (
            HEAD,
            "## What requests ask for\n",
            _features(feature for feature in FEATURES if feature.of is not Of.START),
            REFUSED,
            "## What a server is started with\n",
            _features(feature for feature in FEATURES if feature.of is Of.START),
            "## Settings of one engine\n",
            "With the other one they end the start with exit status 2, unless they have their default.\n",
            _table(
                ("setting", "engine", "what it does"),
                (
                    (f"`{one.flag}`", NAMES["native" if one.name in NATIVE_ONLY else "vllm"], one.help)
                    for one in declared
                    if one.name in of_one
                ),
            ),
            "## Settings of both\n",
            "They mean the same, but for what is said here.\n",
            _table(
                ("setting", *map(NAMES.__getitem__, ENGINES)),
                (_both(one) for one in declared if one.name not in of_one),
            ),
        )
    )


def _features(features: Iterable[Feature]) -> str:
    return _table(
        ("", *map(NAMES.__getitem__, ENGINES)),
        ((feature.words, *(_said(feature.in_engine(engine)) for engine in ENGINES)) for feature in features),
    )


def _said(answer: Has | Lacks | None) -> str:
    match answer:
        case Has(how):
            return f"yes; {how}" if how else "yes"
        case Lacks(why):
            return f"**no**: {why}"
    raise AssertionError("every engine says something of every feature")


def _both(declared: Option) -> tuple[str, ...]:
    flag = declared.flag.replace("--", "--[no-]", 1) if declared.is_switch else declared.flag
    return (f"`{flag}`", *DIFFERENCES.get(declared.name, ("", "")))


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(page(), end="")
