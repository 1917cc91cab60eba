"""What engines declare, what capabilities are made of it, and what is refused by it."""

from __future__ import annotations

import pytest

from engine.errors import RequestError
from engine.features import (
    BY_NAME,
    ENGINES,
    FEATURES,
    Has,
    Lacks,
    Of,
    features_of,
    need_feature,
    not_supported,
)
from engine.request import Capabilities


def known(engine: str, features: frozenset[str]) -> Capabilities:
    return Capabilities(engine=engine, model="inner", max_model_len=8, vocab_size=8, features=features)


def test_names_are_unique_and_every_engine_answers() -> None:
    assert len(BY_NAME) == len(FEATURES)
    for feature in FEATURES:
        answers = [feature.in_engine(engine) for engine in ENGINES]
        assert all(isinstance(answer, Has | Lacks) for answer in answers)
        assert any(isinstance(answer, Has) for answer in answers), f"nobody has {feature.name}"
        assert all(answer.why for answer in answers if isinstance(answer, Lacks))


def test_a_language_model() -> None:
    native = features_of("native", {"generate", "logprobs"})
    assert native == {"generate", "logprobs", "priority", "prefix_cache", "cache_salt", "batch_invariance"}
    vllm = features_of("vllm", {"generate", "grammar"})
    assert vllm == {"generate", "grammar", "priority", "prefix_cache", "cache_salt", "resume"}


def test_an_encoder_alone_has_no_prefix_cache() -> None:
    assert features_of("native", {"embed"}) == {"embed", "priority", "batch_invariance"}


def test_what_no_request_asks_for_is_in_no_capabilities() -> None:
    everything = {feature.name for feature in FEATURES if feature.of is Of.MODEL}
    for engine in ENGINES:
        found = features_of(engine, everything)
        assert not {name for name in found if BY_NAME[name].of is Of.START}
        assert all(isinstance(BY_NAME[name].in_engine(engine), Has) for name in found)


@pytest.mark.parametrize("name", ["resume", "gpu", "priority"])
def test_only_what_depends_on_the_model_is_said_of_it(name: str) -> None:
    with pytest.raises(AssertionError):
        features_of("vllm", {name})


def test_what_is_there_is_not_refused() -> None:
    need_feature(known("vllm", frozenset({"grammar"})), "grammar", model="m", param="tools")


def test_an_engine_that_lacks_it() -> None:
    with pytest.raises(RequestError) as caught:
        need_feature(known("vllm", frozenset()), "batch_invariance", model="m", param="seed")
    assert (caught.value.code, caught.value.param) == ("not_supported_by_engine", "seed")
    assert str(caught.value).startswith(
        "The engine of this server (vllm) does not support answers that do not depend on what else is computed: the "
        "order of its sums"
    )


def test_a_model_that_lacks_it() -> None:
    with pytest.raises(RequestError, match="The model 'm' does not support structured output and calls of tools") as e:
        need_feature(known("native", frozenset({"generate"})), "grammar", model="m", param="tools")
    assert (e.value.code, e.value.param) == ("unsupported_parameter", "tools")


def test_an_engine_that_is_not_declared() -> None:
    assert str(not_supported("gpu", "other")) == "The engine of this server (other) does not support GPUs."
