"""The self-test that `seraph doctor` runs: it passes on what works and fails on what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine.kernels import available_isas, selftest
from engine.kernels.batch import Float32, Int32, Program, StepBatch
from engine.kernels.native import NativeProgram, build

ISAS = available_isas()


@pytest.mark.parametrize("isa", ISAS)
def test_every_build_of_this_machine_passes(isa: str) -> None:
    checks = selftest.self_test(isa)
    assert [(check.name, check.error) for check in checks if check.error] == []
    names = {check.name for check in checks}
    assert {"random numbers", "sampler", "products, bfloat16", "decoder, 4-bit, minimum", "encoder, bfloat16"} <= names
    assert len(names) == len(checks) == 5 + 2 * len(selftest.FORMATS)


class Broken(ModuleType):
    """A build that does one thing wrong."""

    def __init__(self, real: ModuleType, wrong: str) -> None:
        super().__init__(real.__name__)
        self._real, self._wrong = real, wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def matmul(self, matrix: Any, x: Float32, rows: int, y: Float32) -> None:
        self._real.matmul(matrix, x, rows, y)
        if self._wrong == "one bit":
            y.view(np.uint32)[-1, -1] ^= 1
        elif self._wrong == "nan":
            y[0, 0] = np.nan
        elif self._wrong == "raises":
            raise RuntimeError("no such kernel")

    def sample(self, logits: Float32, how: Any, chosen: Int32) -> None:
        self._real.sample(logits, how, chosen)
        if self._wrong == "token":
            chosen[0] += 1

    def uniform(self, seed: int, choice: int, position: int) -> float:
        return 0.5 if self._wrong == "draw" else float(self._real.uniform(seed, choice, position))


@pytest.mark.parametrize(
    ("wrong", "failing", "said"),
    [
        ("one bit", "products", "1 of 11 values differ, the first at [10, 0]: expected"),
        ("nan", "products", "got np.float32(nan)"),
        ("raises", "products", "RuntimeError: no such kernel"),
        ("token", "sampler", "1 tokens: expected [0, 0"),
        ("draw", "random numbers", "draw (0, 0, 0): expected"),
    ],
)
def test_a_wrong_build_fails(wrong: str, failing: str, said: str) -> None:
    real = build(ISAS[0])
    assert real is not None and ISAS[0] not in selftest.UNFUSED
    failed = [check for check in selftest.self_test(ISAS[0], module=Broken(real, wrong)) if check.error]
    assert failed and all(check.name.startswith(failing) for check in failed)
    assert said in failed[0].error


def test_the_portable_build_may_round_and_not_more() -> None:
    real = build("portable")
    assert real is not None
    errors = {check.name for check in selftest.self_test("portable", module=Broken(real, "one bit")) if check.error}
    assert errors == set()
    assert [check.error for check in selftest.self_test("portable", module=Broken(real, "nan")) if check.error]


class Forgetful:
    """A program that loses what lies beyond the first KV block."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._program: Program = NativeProgram(*arguments, **options)

    def step(self, batch: StepBatch) -> Int32:
        batch.block_tables[:] = batch.block_tables[..., :1]
        return self._program.step(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


def test_a_wrong_decoder_fails() -> None:
    failed = [check.name for check in selftest.self_test(ISAS[0], create=Forgetful) if check.error]
    assert failed == [f"decoder, {name}" for name in selftest.FORMATS]


def test_a_build_that_is_not_installed() -> None:
    (check,) = selftest.self_test("neon")
    assert (check.name, check.error) == ("import", "the neon kernels are not installed")


def test_the_survey_and_the_tests_answer_in_json() -> None:
    def ask(*arguments: str) -> Any:
        command = [sys.executable, "-m", "engine.kernels.selftest", *arguments]
        return json.loads(
            subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[3]).stdout
        )

    builds = ask()
    assert tuple(one["isa"] for one in builds if one["installed"] and one["executable"]) == ISAS
    assert all(check["error"] == "" for check in ask("portable"))
