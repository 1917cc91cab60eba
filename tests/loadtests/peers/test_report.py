from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.peers import report
from loadtests.peers.plan import OURS
from loadtests.peers.records import Results
from loadtests.peers.report import BARS
from tests.loadtests.peers.fixtures import header, results


def bar_rows(found: Results) -> list[tuple[str, str]]:
    return [bar.row(found)[2:] for bar in BARS]


def test_the_bars_are_filled_with_what_was_measured() -> None:
    assert bar_rows(results()) == [
        ("3.00x (2.00 to 4.00, 3 pairs)", "reached"),
        ("3.00x (2.00 to 4.00, 3 pairs)", "reached"),
        ("3.00x (2.00 to 4.00, 3 pairs)", "reached"),
        ("3.00x (2.00 to 4.00, 3 pairs)", "reached"),
        ("2.50x (2.00 to 3.00, 2 pairs)", "missed"),
        ("60% (40% to 80%, 9 times)", "reached"),
        ("0.33 s (0.25 to 0.50, 9 times)", "reached"),
    ]


def test_the_best_of_two_peers_is_what_counts() -> None:
    found = results()
    found.measurements = [m for m in found.measurements if (m.system, m.task) != ("openvino", "decode-32")]
    assert bar_rows(found)[2] == ("not measured", "")


def test_nothing_measured_is_said() -> None:
    page = report.render(Results(header()), "plots")
    assert page.count("not measured") == len(BARS)
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## The machine",
        "## Beside the bars",
        "## Again",
    ]


def test_the_page_is_made_of_the_results_alone() -> None:
    page = report.render(results(), "performance")
    assert page == report.render(results(), "performance")
    for line in (
        "| processor | A processor |",
        "| Seraph abc1234 | 300 (200 to 400) | 9,600 (6,400 to 12,800) |",
        "| *Seraph / vLLM* | 2.50x | 2.50x |",
        "| *Seraph's share of the bandwidth bound* | 60% | 60% |",
        "| vLLM | serve | eager | compiled failed, eager 50.0 |",
        "vLLM, serve: ended with status 1",
        "    no | memory",
    ):
        assert line in page.splitlines(), line
    assert all(f"](performance/{name})" in page for name in report.PLOTS)


def test_milliseconds_are_shown_by_phase_beside_the_limit() -> None:
    found = results()
    for one in (m for m in found.measurements if (m.system, m.task) == (OURS, "decode-32")):
        factor = one.figures["tokens_per_second"] / 100  # 3, 2, 4
        phases = {"ms.qkv": 2 * factor, "ms.attend": 3.0, "ms.outside": 1.0, "limit.qkv": factor / 5}
        object.__setattr__(one, "figures", {**one.figures, **phases})
    page = report.render(found, "plots").splitlines()
    assert "| queries, keys, values | 6.00 (60%; 60% of the limit) |" in page
    assert "| attention | 3.00 (30%) |" in page
    assert "| outside the kernels (Python) | 1.00 (10%) |" in page
    assert "| all | 10.0 |" in page


def test_cells_keep_their_table() -> None:
    assert report.table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n|---|---|\n| x\\|y | 1 2 |\n"


@pytest.mark.parametrize(("value", "shown"), [(0.1234, "0.12"), (12.345, "12.3"), (1234.5, "1,234"), (0.0, "0.00")])
def test_numbers(value: float, shown: str) -> None:
    assert report.number(value) == shown


def test_writing(tmp_path: Path) -> None:
    def draw(found: Results, folder: Path) -> None:
        for name in report.PLOTS:
            (folder / name).write_text(report.systems(found)[0])

    report.write(results(), tmp_path / "docs" / "performance.md", tmp_path / "docs" / "performance", draw)
    assert "](performance/throughput.svg)" in (tmp_path / "docs" / "performance.md").read_text()
    assert (tmp_path / "docs" / "performance" / "loads.svg").read_text() == OURS


def test_plots_are_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="installed by `make bench-peers`")
    from loadtests.peers import plots

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plots.draw(results(), tmp_path / name)
    for name in report.PLOTS:
        drawn = (tmp_path / "a" / name).read_bytes()
        assert (drawn.startswith(b"<?xml") and b"Seraph" in drawn) or name == "loads.svg"
        assert drawn == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "empty").mkdir()
    plots.draw(Results(header()), tmp_path / "empty")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == sorted(report.PLOTS)
