from __future__ import annotations

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loadtests.scenario import FOLDER, Range, ScenarioError, load, names, parse


def values(**changes: Any) -> dict[str, Any]:
    return {**tomllib.loads((FOLDER / "chat.toml").read_text()), **changes}


@pytest.mark.parametrize("name", names())
def test_scenarios_of_the_repository(name: str) -> None:
    scenario = load(name)
    (question, *_), *_ = itertools.islice(scenario.conversations(0), 3)
    body = scenario.body(question, [], "m")
    assert body["stream"] is True
    assert scenario.max_tokens.low <= body["max_tokens"] <= scenario.max_tokens.high
    assert [message["role"] for message in body["messages"]] == (
        ["system", "user"] if scenario.shared_prefix_words else ["user"]
    )


def test_the_same_scenario_asks_the_same_questions() -> None:
    def questions(user: int) -> list[Any]:
        return list(itertools.islice(load("chat").conversations(user), 5))

    assert questions(0) == questions(0)
    assert questions(0) != questions(1)


def test_all_users_share_the_prefix() -> None:
    scenario = load("shared_prefix")
    firsts = [next(scenario.conversations(user))[0] for user in range(3)]
    assert len({question.system for question in firsts}) == 1
    assert len(firsts[0].system.split()) == scenario.shared_prefix_words
    assert len({question.text for question in firsts}) == 3


def test_later_turns_carry_what_was_said() -> None:
    scenario = load("chat")
    question = next(scenario.conversations(0))[0]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert scenario.body(question, said, "m")["messages"] == [*said, {"role": "user", "content": question.text}]


def test_a_count_is_a_range_of_one() -> None:
    assert parse(values(turns=3), Path("x.toml")).turns == Range(low=3, high=3)
    assert parse(values(turns=[3, 5]), Path("x.toml")).turns == Range(low=3, high=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turn": 1}, "turn is unknown"),
        ({"turns": 0}, "turns must be a count or .low, high., got 0"),
        ({"turns": [2, 1]}, "turns must be .*, got .2, 1."),
        ({"turns": [1, 2, 3]}, "turns must be"),
        ({"turns": True}, "turns must be"),
        ({"max_tokens": 1 << 30}, "max_tokens must be"),
        ({"temperature": 3}, "temperature must be 0 to 2, got 3"),
        ({"think_seconds": -1}, "think_seconds must be"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"seed": "x"}, "seed must be"),
        ({"description": 1}, "description must be"),
        ({"shared_prefix_words": -1}, "shared_prefix_words must be"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=f"^x.toml: {message}"):
        parse(values(**changes), Path("x.toml"))


def test_a_missing_key() -> None:
    broken = values()
    del broken["seed"]
    with pytest.raises(ScenarioError, match="seed is missing"):
        parse(broken, Path("x.toml"))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="must be one of chat, shared_prefix, throughput or a file, got 'nope'"):
        load("nope")
    path = tmp_path / "broken.toml"
    path.write_text("seed = ")
    with pytest.raises(ScenarioError, match=r"broken\.toml: "):
        load(str(path))
