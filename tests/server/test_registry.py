"""Models by name: who has which, and what they are together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.errors import RequestError
from engine.request import Capabilities
from server.errors import ConflictError
from server.kinds import Kind, need_kind
from server.metrics import Metrics
from server.registry import Registry, ServedModel
from tests.server.fakes import FakeEngine, FakeText


def model(*names: str, engine: FakeEngine | None = None, **fields: Any) -> ServedModel:
    return ServedModel(names=names, source=names[0], engine=engine or FakeEngine(), text=FakeText(), **fields)


@pytest.fixture
def registry() -> Iterator[Registry]:
    yield Registry(Metrics(), max_running=4, max_waiting=4)


def test_models_are_found_by_every_name(registry: Registry) -> None:
    a, b = model("a", "alias"), model("org/b")
    for one in (a, b):
        registry.add(one)
    assert registry.names == ["a", "alias", "org/b"]
    assert (registry.find("alias"), registry.find("org/b"), registry.find("c")) == (a, b, None)
    with pytest.raises(ConflictError, match="There is a model 'alias' already"):
        registry.add(model("c", "alias"))
    registry.remove(a)
    assert (registry.names, len(registry)) == (["org/b"], 1)
    registry.add(model("alias"))


def set_state(one: ServedModel, state: str) -> None:
    engine = one.engine
    assert isinstance(engine, FakeEngine)
    one.started, one.draining = state != "starting", state == "draining"
    engine.ready, engine.alive = state == "ready", state in ("ready", "restarting")


@pytest.mark.parametrize(
    ("states", "together"),
    [
        ([], "empty"),
        (["ready", "ready"], "ready"),
        (["ready", "starting"], "starting"),
        (["restarting", "ready"], "restarting"),
        (["restarting", "dead", "ready"], "dead"),
        (["ready", "draining"], "ready"),  # who goes is no longer asked
        (["draining"], "empty"),
    ],
)
def test_the_state_of_all(registry: Registry, states: list[str], together: str) -> None:
    for place, state in enumerate(states):
        one = model(f"m{place}")
        set_state(one, state)
        assert one.state == state
        registry.add(one)
    assert registry.state == together


def test_an_encoder_lives_with_its_host(registry: Registry) -> None:
    host = model("a", weights_bytes=10)
    guest = model("e", engine=host.engine, kind=Kind.EMBED, host="a", weights_bytes=5)  # type: ignore[arg-type]
    for one in (host, guest):
        registry.add(one)
        one.known = Capabilities(engine="x", model="a", max_model_len=1, vocab_size=1, kv_cache_bytes=100)
    assert (registry.guests(host), registry.guests(guest)) == ([guest], [])
    assert (host.nbytes, guest.nbytes) == (110, 5)


def test_what_a_model_is_not_for_is_said() -> None:
    need_kind("a", Kind.GENERATE, Kind.GENERATE, "chat")
    with pytest.raises(RequestError, match="The model 'e' does not support chat: it is an embedding model") as caught:
        need_kind("e", Kind.EMBED, Kind.GENERATE, "chat")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_supported")
    with pytest.raises(RequestError, match="does not support embeddings: it is a language model"):
        need_kind("a", Kind.GENERATE, Kind.EMBED, "embeddings")
