"""What users ask: scenarios as TOML files, and the requests that follow from one and its seed."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("scenarios")
LIMIT = 1 << 20
"""The most words or tokens a scenario may ask for at once."""

_WORDS = """
river stone garden winter lantern copper window harbor silver meadow thunder paper candle forest bridge engine market
island shadow story number letter music morning village cotton planet summer salt anchor
"""
WORDS = tuple(_WORDS.split())


class ScenarioError(ValueError):
    """A scenario file cannot be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A whole number drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def draw(self, numbers: random.Random) -> int:
        return numbers.randint(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """How every user of a load test behaves. Two runs of one scenario ask the same questions in the same order."""

    name: str
    description: str
    seed: int
    shared_prefix_words: int  # of a system message that all users have in common; 0: none
    prompt_words: Range  # of each question
    turns: Range  # questions of one conversation; later ones carry what was said before
    max_tokens: Range  # of each answer
    ignore_eos: bool  # answers have exactly max_tokens
    temperature: float
    think_seconds: float  # mean pause between an answer and the next question; 0: none

    def conversations(self, user: int) -> Iterator[list[Question]]:
        """The endless conversations of user number `user`."""
        numbers = random.Random(f"{self.seed}/{user}")
        prefix = _words(random.Random(self.seed), self.shared_prefix_words)
        while True:
            yield [
                Question(
                    system=prefix,
                    text=f"Write about this: {_words(numbers, self.prompt_words.draw(numbers))}.",
                    max_tokens=self.max_tokens.draw(numbers),
                    seed=numbers.getrandbits(32),
                    pause=numbers.expovariate(1 / self.think_seconds) if self.think_seconds else 0.0,
                )
                for _ in range(self.turns.draw(numbers))
            ]

    def body(self, question: Question, before: list[dict[str, str]], model: str) -> dict[str, Any]:
        """The chat request for a question after the messages `before`."""
        system = [{"role": "system", "content": question.system}] if question.system else []
        return {
            "model": model,
            "messages": [*system, *before, {"role": "user", "content": question.text}],
            "max_tokens": question.max_tokens,
            "temperature": self.temperature,
            "seed": question.seed,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request of a user."""

    system: str
    text: str
    max_tokens: int
    seed: int
    pause: float  # seconds before the next question


def _words(numbers: random.Random, count: int) -> str:
    return " ".join(numbers.choices(WORDS, k=count))


def names() -> list[str]:
    """The scenarios that come with the repository."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Scenario:
    """A scenario by its name, or by the path of its file. Raises ScenarioError."""
    path = FOLDER / f"{name}.toml" if name in names() else Path(name)
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ScenarioError(f"scenario must be one of {', '.join(names())} or a file, got {name!r}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"{path}: {error}") from None
    return parse(values, path)


def parse(values: Mapping[str, Any], path: Path) -> Scenario:
    """A scenario from what its file holds; every key must be there and no other. Raises ScenarioError."""
    keys = {one.name for one in fields(Scenario)} - {"name"}
    if wrong := keys ^ values.keys():
        missing_or_unknown = "missing" if (key := min(wrong)) in keys else "unknown"
        raise ScenarioError(f"{path}: {key} is {missing_or_unknown}")

    def need(key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ScenarioError(f"{path}: {key} must be {allowed}, got {values[key]!r}")

    def whole(value: object, low: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= LIMIT

    def number_range(key: str) -> Range:
        value = values[key]
        pair = value if isinstance(value, list) else [value, value]
        need(
            key, len(pair) == 2 and all(whole(one, 1) for one in pair) and pair[0] <= pair[1], "a count or [low, high]"
        )
        return Range(low=pair[0], high=pair[1])

    def number(key: str, high: float) -> float:
        value = values[key]
        need(
            key, isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high, f"0 to {high:g}"
        )
        return float(value)

    need("description", isinstance(values["description"], str), "a text")
    need("seed", whole(values["seed"], 0), "a whole number from 0")
    need("shared_prefix_words", whole(values["shared_prefix_words"], 0), "a count from 0")
    need("ignore_eos", isinstance(values["ignore_eos"], bool), "true or false")
    return Scenario(
        name=path.stem,
        description=values["description"],
        seed=values["seed"],
        shared_prefix_words=values["shared_prefix_words"],
        prompt_words=number_range("prompt_words"),
        turns=number_range("turns"),
        max_tokens=number_range("max_tokens"),
        ignore_eos=values["ignore_eos"],
        temperature=number("temperature", 2.0),
        think_seconds=number("think_seconds", 3600.0),
    )
