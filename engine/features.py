"""What each engine can do, declared once: an engine's capabilities, what the server refuses, and docs/engines.md."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from engine.errors import RequestError
from engine.request import Capabilities

ENGINES = ("native", "vllm")


@dataclass(frozen=True, slots=True)
class Has:
    """An engine has a feature; `how` is what to know of it."""

    how: str = ""


@dataclass(frozen=True, slots=True)
class Lacks:
    """An engine lacks a feature; refusals end with `why`."""

    why: str


class Of(enum.Enum):
    """What a feature depends on, beside the engine."""

    MODEL = "the model"  # its engine says whether this model has it
    TEXT = "that the model writes text"
    NOTHING = "nothing else"
    START = "how the server was started"  # no request asks for it, and no Capabilities have it


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that engines have or lack."""

    name: str  # in Capabilities.features
    words: str  # as in "does not support ..."
    of: Of
    native: Has | Lacks
    vllm: Has | Lacks

    def in_engine(self, engine: str) -> Has | Lacks | None:
        """What an engine says of it; None for one that is not declared here."""
        return {"native": self.native, "vllm": self.vllm}.get(engine)


FEATURES = (
    Feature("generate", "chats and completions", Of.MODEL, Has(), Has()),
    Feature(
        "embed",
        "embeddings",
        Of.MODEL,
        Has("by encoders: BERT, RoBERTa, XLM-RoBERTa"),
        Has("by the same encoders"),
    ),
    Feature("score", "scores and reranking", Of.MODEL, Has("by cross-encoders"), Has("by cross-encoders")),
    Feature(
        "grammar",
        "structured output and calls of tools",
        Of.MODEL,
        Has("where the model has a token that ends an answer"),
        Has(
            "of the same grammars; the version of their library that vLLM pins sets no bound to runs of white space in "
            "JSON"
        ),
    ),
    Feature("logprobs", "log-probabilities", Of.MODEL, Has(), Has()),
    Feature("prompt_logprobs", "log-probabilities of prompts", Of.MODEL, Has(), Has()),
    Feature("priority", "priorities", Of.NOTHING, Has(), Has()),
    Feature("prefix_cache", "a prefix cache", Of.TEXT, Has(), Has()),
    Feature("cache_salt", "cache salts", Of.TEXT, Has(), Has()),
    Feature(
        "batch_invariance",
        "answers that do not depend on what else is computed",
        Of.NOTHING,
        Has("to the last bit, within one instruction set"),
        Lacks(
            "the order of its sums changes with what shares a step, so that a seed, or temperature 0, need not give "
            "the same answer twice"
        ),
    ),
    Feature(
        "resume",
        "answers that go on after the engine process has died",
        Of.NOTHING,
        Lacks("requests in flight fail at once with 503 and may be sent again"),
        Has(
            "from the last token on, greedy and sampled; presence and frequency penalties then count from there. An "
            "answer that is held to a form and has begun fails with 503"
        ),
    ),
    Feature(
        "runtime_models",
        "models that are loaded while the server runs",
        Of.START,
        Has("by `/admin/models`"),
        Lacks("memory is divided among the models of the start"),
    ),
    Feature(
        "shared_process",
        "an embedding model in the process of a language model",
        Of.START,
        Has("`--embedding-model`"),
        Lacks("each model has processes of its own: name it among the models"),
    ),
    Feature(
        "gpu",
        "GPUs",
        Of.START,
        Lacks("its kernels are for x86-64 CPUs"),
        Has("those that its build is for; its CPU build computes on CPUs. What was tried on one: [gpu.md](gpu.md)"),
    ),
    Feature(
        "tensor_parallel",
        "tensor parallelism",
        Of.START,
        Has("ranks of threads, by itself one for each NUMA node"),
        Has("over GPUs; not tried yet"),
    ),
    Feature(
        "pipeline_parallel",
        "pipeline parallelism, over several machines too",
        Of.START,
        Lacks("one process computes all of a model"),
        Has("`--pipeline-parallel-size`; not tried yet"),
    ),
    Feature(
        "gguf",
        "quantized GGUF files, computed as they are",
        Of.START,
        Has("without a matrix of float weights"),
        Lacks("a file is converted once, to a folder of bfloat16 weights under `SERAPH_HOME`"),
    ),
    Feature(
        "any_family",
        "families of models beyond those that README.md lists",
        Of.START,
        Lacks("a family is computed where `engine/models` describes it"),
        Has("those that vLLM knows, as Hugging Face folders; GGUF files of the listed ones alone"),
    ),
)

BY_NAME: Mapping[str, Feature] = {feature.name: feature for feature in FEATURES}


def features_of(engine: str, of_model: Collection[str]) -> frozenset[str]:
    """Capabilities.features of an engine with a model that has `of_model`, of those that depend on it."""
    for name in of_model:
        feature = BY_NAME[name]
        assert feature.of is Of.MODEL and isinstance(feature.in_engine(engine), Has), f"{engine} declares {name}"
    found = set(of_model)
    for feature in FEATURES:
        always = feature.of is Of.NOTHING or (feature.of is Of.TEXT and "generate" in of_model)
        if always and isinstance(feature.in_engine(engine), Has):
            found.add(feature.name)
    return frozenset(found)


def need_feature(known: Capabilities, name: str, *, model: str, param: str | None) -> None:
    """Raises RequestError unless a model, `model` to its callers, and its engine have a feature."""
    if name in known.features:
        return
    if isinstance(BY_NAME[name].in_engine(known.engine), Has):  # so it is the model that lacks it
        raise RequestError(
            f"The model {model!r} does not support {BY_NAME[name].words}.", param=param, code="unsupported_parameter"
        )
    raise not_supported(name, known.engine, param=param)


def not_supported(name: str, engine: str, *, param: str | None = None) -> RequestError:
    """What a caller is told who asks an engine for what it lacks."""
    feature = BY_NAME[name]
    answer = feature.in_engine(engine)
    why = f": {answer.why}" if isinstance(answer, Lacks) else ""
    return RequestError(
        f"The engine of this server ({engine}) does not support {feature.words}{why}.",
        param=param,
        code="not_supported_by_engine",
    )
