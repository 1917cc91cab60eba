"""Tokens of one step: what stays, what is chosen again and from what, what was said before, how one fails alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.errors import EngineError, RequestError, SeraphError
from engine.request import Request, SamplingParams, StructuredOutputs
from engine.sampling.grammar import GrammarCompiler
from engine.sampling.masks import ChooseAgain, Grammars, Rows

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
    """Requests with regular expressions, and what becomes of tokens that steps chose for them."""

    def __init__(self, grammars: Grammars, compiler: GrammarCompiler) -> None:
        self.grammars, self.compiler = grammars, compiler
        self.output: dict[str, list[int]] = {}
        self.allowed: dict[int, set[int]] = {}
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

    def rows(self, name: str, draft: list[int], stop: frozenset[int] = frozenset({EOS})) -> Rows:
        first, self.row = self.row, self.row + 1 + len(draft)
        return Rows(name, first, len(self.output[name]), draft, stop)

    def settle(self, rows: list[Rows], tokens: list[int], choose_again: ChooseAgain | None = None) -> list[int]:
        """What becomes of the tokens that a step chose; where one is chosen again, the smallest that is allowed.

        `allowed` has what that was chosen from, by row.
        """
        self.row, self.allowed = 0, {}
        settled = list(tokens)
        self.grammars.settle(rows, settled, choose_again or self.choose_again)
        return settled

    def choose_again(self, row: int, mask: NDArray[np.uint32]) -> int:
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        self.allowed[row] = set(allowed)
        return min(allowed, default=-1)

    def say(self, name: str, *tokens: int) -> list[int]:
        """Steps of one request, whose tokens are entered."""
        return [self.settle([self.rows(name, [])], [token])[0] for token in self.entering(name, tokens)]

    def entering(self, name: str, tokens: Sequence[int]) -> Iterator[int]:
        for token in tokens:
            yield token
            self.output[name].append(token)


@pytest.fixture
def driver(grammars: Grammars, compiler: GrammarCompiler) -> Driver:
    return Driver(grammars, compiler)


def test_what_is_allowed_stays_and_what_is_not_is_chosen_again(driver: Driver) -> None:
    driver.add("r", "a?b+c")
    assert driver.prepared() == {"r": None}
    assert driver.settle([driver.rows("r", [])], [25]) == [1]
    assert driver.allowed == {0: {1, 2, AB}} and driver.grammars.num_masks == 1
    driver.output["r"] = [1]
    for token in ids("bbc"):
        assert driver.settle([driver.rows("r", [])], [token]) == [token] and not driver.allowed
        driver.output["r"].append(token)
    assert driver.settle([driver.rows("r", [])], [2]) == [EOS] and driver.allowed == {0: {EOS}}
    assert driver.grammars.num_masks == 2 and driver.grammars.seconds > 0


def test_tokens_that_were_settled_must_be_entered(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.add("r", "a?b+c")
    driver.prepared()
    assert driver.settle([driver.rows("r", [])], ids("b")) == ids("b")
    assert driver.settle([driver.rows("r", [])], ids("b")) == [-1]
    assert "it has taken in 1 tokens of 0" in str(driver.grammars.forget("r"))


def test_guesses_count_as_long_as_they_are_right(driver: Driver) -> None:
    driver.add("r", "ab?(cd|e)?")
    driver.prepared()
    # Guessed "abcd". After "ab" something else is chosen, so that what comes after it is not looked at.
    assert driver.settle([driver.rows("r", ids("abcd"))], [*ids("abe"), 25, 25]) == [*ids("abe"), 25, 25]
    assert not driver.allowed
    driver.output["r"] = ids("abe")
    assert driver.settle([driver.rows("r", ids("z"))], ids("zz")) == [EOS, 26]  # the guess was wrong, too


def test_a_token_that_is_chosen_again_may_be_the_guess(driver: Driver) -> None:
    driver.add("r", "(a|x)(b|y)(c|y)(d|e)f")
    driver.prepared()
    # Chosen: z, refused, for a, as guessed; b; z for c, as guessed; e, which was not guessed.
    assert driver.settle([driver.rows("r", ids("abcd"))], [*ids("zbze"), 25]) == [*ids("abce"), 25]
    assert driver.allowed == {0: {1, 24, AB}, 2: {3, 25}}
    driver.output["r"] = ids("abce")
    assert driver.settle([driver.rows("r", [EOS])], [*ids("f"), 9]) == [*ids("f"), 9]
    driver.output["r"] = ids("abcef")
    assert driver.settle([driver.rows("r", [])], [9]) == [EOS] and driver.allowed == {0: {EOS}}


def test_many_at_once(driver: Driver) -> None:
    names = [f"r{i}" for i in range(8)]
    for i, name in enumerate(names):
        driver.add(name, f"[ab]{'abcdefgh'[i]}c")
    driver.prepared()
    rows = [driver.rows(name, []) for name in names]
    chosen = [25 if i % 3 else 2 for i in range(8)]
    assert driver.settle(rows, chosen) == [1 if i % 3 else 2 for i in range(8)]
    assert driver.allowed.keys() == {1, 2, 4, 5, 7} and driver.grammars.num_masks == 5


def test_what_was_said_before_counts(driver: Driver) -> None:
    driver.add("fresh", "abc")
    driver.add("resumed", "abc", output="ab")
    driver.add("wrong", "abc", output="ac")
    prepared = driver.prepared()
    assert prepared["fresh"] is prepared["resumed"] is None
    assert "does not allow output_token_ids" in str(prepared["wrong"])
    assert driver.settle([driver.rows("fresh", []), driver.rows("resumed", [])], ids("az")) == ids("ac")


def test_until_min_tokens_the_end_waits_if_anything_else_is_left(driver: Driver) -> None:
    driver.add("r", "ab?", min_tokens=3)
    driver.prepared()
    assert driver.say("r", *ids("a")) == ids("a")
    assert driver.settle([driver.rows("r", [])], [EOS]) == ids("b")
    driver.output["r"] += ids("b")
    assert driver.settle([driver.rows("r", [])], [EOS]) == [EOS]
    driver.add("s", "a(b|c)*", min_tokens=2)
    driver.prepared()
    stop = frozenset({EOS, 2})
    driver.say("s", *ids("a"))
    assert driver.settle([driver.rows("s", ids("c"), stop)], ids("bb")) == ids("cb")
    assert driver.allowed == {0: {3}}


@pytest.mark.parametrize("regex", ["(ab|ba)*c?", "a( c|b){1,3}", "[a-z]*", "(abc|abd|x)y?", "z"])
@pytest.mark.parametrize("said", ["", "a", "ab", "abc", "x", "z", "abcy", "ba"])
def test_masks_and_checks_allow_the_same_tokens(driver: Driver, regex: str, said: str) -> None:
    names = [f"r{token}" for token in range(VOCAB)]
    for name in names:
        driver.add(name, regex, output=said)
    if any(error is not None for error in driver.prepared().values()):
        return  # not a beginning of this language
    free, allowed = set(), set()
    for token, name in enumerate(names):
        settled = driver.settle([driver.rows(name, [])], [token])
        allowed |= driver.allowed.get(0, set())
        if not driver.allowed:
            free.add(token)
            assert settled == [token]
    assert free == allowed


def test_prescribed_text_may_be_written_in_the_model_s_way(driver: Driver) -> None:
    driver.add("r", "abc")
    driver.prepared()
    assert driver.settle([driver.rows("r", [])], [25]) == [AB] and driver.allowed == {0: {AB}}
    driver.add("s", "abc")
    driver.prepared()
    assert driver.say("s", *ids("abc")) == ids("abc")


def test_one_that_fails_is_alone(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.add("bad", "", grammar='{"grammars":[{"lark_grammar":"start: nonesuch"}]}')
    driver.add("lost", "abc")
    driver.add("good", "(a|x)bc")
    prepared = driver.prepared()
    assert isinstance(prepared["bad"], RequestError) and "nonesuch" in str(prepared["bad"])
    assert prepared["good"] is None

    def choose_again(row: int, mask: NDArray[np.uint32]) -> int:
        if row == 0:
            raise ZeroDivisionError("lost")
        return driver.choose_again(row, mask)

    rows = [driver.rows("lost", ids("a")), driver.rows("good", [])]
    assert driver.settle(rows, ids("yaz"), choose_again) == [-1, *ids("aa")]
    assert driver.settle([driver.rows("lost", [])], ids("a")) == [-1]
    lost = driver.grammars.forget("lost")
    assert isinstance(lost, EngineError) and "ZeroDivisionError: lost" in str(lost)
    assert driver.grammars.forget("good") is None is driver.grammars.forget("never")
    assert len(driver.grammars) == 1
    assert "request lost: its grammar failed" in caplog.text


def test_one_that_was_forgotten_while_its_step_ran(driver: Driver) -> None:
    driver.add("r", "abc")
    driver.prepared()
    rows = driver.rows("r", [])
    driver.grammars.forget("r")
    assert driver.settle([rows], [25]) == [25]


def test_a_vocabulary_that_cannot_write_the_grammar_fails_it(driver: Driver) -> None:
    driver.add("r", "(a|ß)")
    driver.prepared()
    assert driver.settle([driver.rows("r", [])], [25]) == [1] and driver.allowed == {0: {1}}


def test_time_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sampling.masks.MASK_SECONDS", 0.0)
    monkeypatch.setattr("engine.sampling.masks.MASK_SECONDS_PER_TOKEN", 0.0)
    driver.add("r", "[ab]*")
    driver.prepared()
    assert driver.say("r", *ids("aa")) == [*ids("a"), -1]
    failure = driver.grammars.forget("r")
    assert isinstance(failure, RequestError) and "takes too long" in str(failure)


def test_forgotten_while_compiling(driver: Driver) -> None:
    driver.add("r", "abc")
    driver.grammars.forget("r")
    driver.add("r", "xyz")
    assert driver.prepared() == {"r": None}
    assert driver.settle([driver.rows("r", [])], ids("a")) == [24]
