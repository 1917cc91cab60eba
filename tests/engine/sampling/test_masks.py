"""Masks of one step: what they allow, of guesses too, what was said before, and how one that fails is alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from engine.errors import RequestError, SeraphError
from engine.request import Request, SamplingParams, StructuredOutputs
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.masks import Grammars, Rows

EOS = 0
LETTERS = 1 + np.arange(26)  # token 1 is "a"
AB, SPACED, EMPTY = 27, 28, 29
VOCAB = 70  # not a multiple of 32, and longer than the tokenizer's


class Letters:
    """A vocabulary of letters, two longer tokens, and one that ends; "ab" is how it writes a and b."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = (EOS,)
    special_token_ids = frozenset({EOS})
    pieces: tuple[bytes, ...] = (
        b"<end>",
        *(bytes([byte]) for byte in range(97, 123)),
        b"ab",
        b" c",
        b"",
        *[b""] * (VOCAB - 30),
    )

    def encode_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        # As tokenizers of the SentencePiece kind do it: with a space before the text.
        return [SPACED, *(ord(c) - 96 for c in text)] if text else []


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    with GrammarCompiler() as compiler:
        yield compiler


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(Letters, vocab_size=VOCAB, eos_token_ids=(EOS,), num_rows=8, threads=2)
    yield grammars
    grammars.close()


def ids(text: str) -> list[int]:
    return [ord(c) - 96 for c in text]


class Driver:
    """Requests with regular expressions, and their masks as sets of tokens."""

    def __init__(self, grammars: Grammars, compiler: GrammarCompiler) -> None:
        self.grammars, self.compiler = grammars, compiler
        self.output: dict[str, list[int]] = {}
        self.row = 0
        self.preparing: set[str] = set()

    def add(self, name: str, regex: str, *, output: str = "", grammar: str | None = None, min_tokens: int = 0) -> None:
        compiled = self.compiler.compile(StructuredOutputs(regex=regex)) if grammar is None else grammar
        self.grammars.prepare(
            Request(
                request_id=name,
                model="m",
                prompt_token_ids=[1],
                sampling=SamplingParams(min_tokens=min_tokens),
                seed=0,
                output_token_ids=ids(output),
                grammar=compiled,
            )
        )
        self.output[name] = ids(output)
        self.preparing.add(name)

    def prepared(self) -> dict[str, SeraphError | None]:
        found: dict[str, SeraphError | None] = {}
        for _ in range(1000):
            found |= dict(self.grammars.take_prepared())
            if found.keys() == self.preparing:
                self.preparing = set()
                return found
            self.grammars.wait(1)
        raise AssertionError("never ready")

    def rows(self, name: str, said: list[int], draft: list[int], stop: frozenset[int] = frozenset({EOS})) -> Rows:
        known = self.grammars.num_consumed(name)
        self.output[name] += said
        first, self.row = self.row, self.row + 1 + len(draft)
        return Rows(name, first, len(self.output[name]), self.output[name][known:], draft, stop)

    def step(self, *rows: Rows) -> list[set[int]]:
        self.row = 0
        self.grammars.begin(list(rows))
        self.grammars.finish()
        num_rows = sum(1 + len(each.draft) for each in rows)
        assert self.grammars.ready[:num_rows].all()
        bits = np.unpackbits(self.grammars.masks[:num_rows].view(np.uint8), axis=1, bitorder="little")
        return [set(np.flatnonzero(row).tolist()) for row in bits]


@pytest.fixture
def driver(grammars: Grammars, compiler: GrammarCompiler) -> Driver:
    return Driver(grammars, compiler)


def test_masks_follow_the_tokens_and_end_where_the_grammar_may(driver: Driver) -> None:
    driver.add("r", "a?b+c")
    assert driver.prepared() == {"r": None}
    assert driver.step(driver.rows("r", [], [])) == [{1, 2, AB}]
    assert driver.step(driver.rows("r", [AB], [])) == [{2, 3}]
    assert driver.step(driver.rows("r", [], [])) == [{2, 3}]  # a step that was not entered is made anew
    assert driver.step(driver.rows("r", ids("bb"), [])) == [{2, 3}]  # two at once, of which one was guessed
    assert driver.step(driver.rows("r", ids("c"), [])) == [{EOS}]
    assert driver.grammars.num_masks == 5


def test_a_row_for_each_guess_and_nothing_stays_of_them(driver: Driver) -> None:
    driver.add("r", "ab?(cd|e)?")
    driver.prepared()
    assert driver.step(driver.rows("r", [], ids("abcdz"))) == [{1, AB}, {EOS, 2, 3, 5}, {EOS, 3, 5}, {4}, {EOS}, set()]
    assert driver.step(driver.rows("r", ids("a"), [*ids("e"), EOS])) == [{EOS, 2, 3, 5}, {EOS}, set()]
    assert driver.step(driver.rows("r", ids("b"), [])) == [{EOS, 3, 5}]


def test_what_was_said_before_counts(driver: Driver) -> None:
    driver.add("fresh", "abc")
    driver.add("resumed", "abc", output="ab")
    driver.add("wrong", "abc", output="ac")
    prepared = driver.prepared()
    assert prepared["fresh"] is prepared["resumed"] is None
    assert "does not allow output_token_ids" in str(prepared["wrong"])
    assert driver.step(driver.rows("fresh", [], []), driver.rows("resumed", [], []))[1] == {3}


def test_until_min_tokens_the_end_waits_if_anything_else_is_left(driver: Driver) -> None:
    driver.add("r", "ab?", min_tokens=3)
    driver.prepared()
    assert driver.step(driver.rows("r", ids("a"), [])) == [{2}]
    assert driver.step(driver.rows("r", ids("b"), [])) == [{EOS}]
    driver.add("s", "a(b|c)*", min_tokens=2)
    driver.prepared()
    stop = frozenset({EOS, 2})
    assert driver.step(driver.rows("s", ids("a"), ids("c"), stop)) == [{3}, {EOS, 2, 3}]


def test_one_that_fails_is_alone(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.add("bad", "", grammar='{"grammars":[{"lark_grammar":"start: nonesuch"}]}')
    driver.add("lost", "abc")
    driver.add("good", "abc")
    prepared = driver.prepared()
    assert isinstance(prepared["bad"], RequestError) and "nonesuch" in str(prepared["bad"])
    assert prepared["good"] is None
    masks = driver.step(driver.rows("lost", ids("z"), ids("a")), driver.rows("good", ids("a"), []))
    assert masks == [set(), set(), {2}]
    lost = driver.grammars.forget("lost")
    assert isinstance(lost, RequestError) and "did not take the tokens" in str(lost)
    assert driver.grammars.forget("good") is None is driver.grammars.forget("never")
    assert len(driver.grammars) == 1


def test_a_vocabulary_that_cannot_write_the_grammar_fails_it(driver: Driver) -> None:
    driver.add("r", "(a|ß)")
    driver.prepared()
    assert driver.step(driver.rows("r", [], [])) == [{1}]


def test_time_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sampling.masks.MASK_SECONDS", 0.0)
    monkeypatch.setattr("engine.sampling.masks.MASK_SECONDS_PER_TOKEN", 0.0)
    driver.add("r", "[ab]*")
    driver.prepared()
    assert driver.step(driver.rows("r", [], []))[0]
    assert driver.step(driver.rows("r", ids("a"), [])) == [set()]
    failure = driver.grammars.forget("r")
    assert isinstance(failure, RequestError) and "takes too long" in str(failure)


def test_forgotten_while_compiling(driver: Driver) -> None:
    driver.add("r", "abc")
    driver.grammars.forget("r")
    driver.add("r", "xyz")
    assert driver.prepared() == {"r": None}
    assert driver.step(driver.rows("r", [], [])) == [{24}]
