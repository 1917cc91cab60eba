"""docs/offline.md is a program: its blocks run in order, and print what the page says they print.

`python -m tests.test_offline_page` runs it and writes what was printed into the page. Lines that begin with `#` are
figures of the machine, which differ from run to run.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

from engine.kernels import select_isa

PAGE = Path(__file__).resolve().parents[1] / "docs" / "offline.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def run(page: str) -> str:
    """The page with what its blocks print, below each of them."""
    names: dict[str, object] = {"__name__": "__main__"}

    def executed(block: re.Match[str]) -> str:
        line = page.count("\n", 0, block.start("code"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            # Padded, so that a traceback shows the page's own line numbers.
            exec(compile("\n" * line + block["code"], str(PAGE), "exec"), names)
        text = f"```python\n{block['code']}```\n"
        return text + (f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else "")

    return BLOCK.sub(executed, page)


def outputs(page: str) -> list[list[str]]:
    """What each block of a page prints, without the figures of the machine."""
    printed = (block["printed"] or "" for block in BLOCK.finditer(page))
    return [[line for line in text.splitlines() if not line.startswith("#")] for text in printed]


@pytest.mark.usefixtures("default_model")
def test_the_page_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    assert page.count("```python\n") == len(outputs(page)) > 10
    found = outputs(run(page))
    if select_isa() in ("avx512", "avx2"):
        assert found == outputs(page)
    else:  # other kernels round differently, so that a text may take another turn
        assert [len(lines) for lines in found] == [len(lines) for lines in outputs(page)]
    assert re.search(r"8/8, \d+ tokens, [\d,]+ tokens/s", capsys.readouterr().err)


def test_a_block_that_fails_fails_at_its_own_line() -> None:
    page = "# Title\n\n```python\nx = 1\nprint(x)\n```\n\nProse.\n\n```python\nprint(x + 1)\nraise ValueError(x)\n```\n"
    with pytest.raises(ValueError, match="1") as caught:
        run(page)
    assert caught.traceback[-1].lineno + 1 == 12
    assert outputs(run(page.replace("raise ValueError(x)\n", "print('# 7 ms')\n"))) == [["1"], ["2"]]


if __name__ == "__main__":
    sys.stderr.write(f"writing {PAGE}\n")
    PAGE.write_text(run(PAGE.read_text()))
