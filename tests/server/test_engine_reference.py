"""docs/engines.md is what engines and settings declare."""

from __future__ import annotations

from pathlib import Path

from engine.features import FEATURES, Lacks
from server.engine_reference import DIFFERENCES, ENGINE_GROUPS, page
from server.settings import NATIVE_ONLY, VLLM_ONLY, options

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "docs/engines.md is stale: run `make docs`"


def test_the_page_has_every_feature_and_why_an_engine_lacks_it() -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.read_text().splitlines() if " | " in line}
    for feature in FEATURES:
        row = rows[feature.words]
        for answer, cell in zip((feature.native, feature.vllm), row.strip("| ").split(" | ")[1:], strict=True):
            assert cell.startswith("**no**: " if isinstance(answer, Lacks) else "yes")
            assert (answer.why if isinstance(answer, Lacks) else answer.how) in cell


def test_settings_stand_in_one_table_each() -> None:
    assert not NATIVE_ONLY & VLLM_ONLY
    declared = {one.name: one for one in options()}
    assert declared.keys() >= NATIVE_ONLY | VLLM_ONLY | DIFFERENCES.keys()
    assert not DIFFERENCES.keys() & (NATIVE_ONLY | VLLM_ONLY)
    of_one, both = PAGE.read_text().partition("## Settings of one engine")[2].split("## Settings of both")
    for name, one in declared.items():
        flag = f"| `{one.flag.replace('--', '--[no-]', 1) if one.is_switch else one.flag}` |"
        expected = (name in NATIVE_ONLY | VLLM_ONLY, one.group in ENGINE_GROUPS and name not in NATIVE_ONLY | VLLM_ONLY)
        assert (flag in of_one, flag in both) == expected, name
    for name in NATIVE_ONLY | VLLM_ONLY:
        assert f"| `{declared[name].flag}` | {'native' if name in NATIVE_ONLY else 'vLLM'} |" in of_one
