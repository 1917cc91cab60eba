from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.peers import records
from loadtests.peers.records import Record, RecordsError
from tests.loadtests.peers.fixtures import header, measurement, results


def written(path: Path) -> Path:
    made = results()
    every: list[Record] = [made.header, *made.choices, *made.measurements, *made.failures]
    for record in every:
        records.write(path, record)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert records.read(written(tmp_path / "r.jsonl")) == results()


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "r.jsonl"
    begun = records.resume(path, header())
    assert not begun.measurements
    records.write(path, measurement(0, "vllm", "vllm", "serve", {"a": 1.0}))
    with path.open("a") as file:
        file.write('{"kind": "measurement", "rou')  # killed while it wrote
    assert records.read(path).has(0, "vllm", "vllm", "serve")
    found = records.resume(path, header())
    assert found.has(0, "vllm", "vllm", "serve") and not found.has(1, "vllm", "vllm", "serve")
    records.write(path, measurement(1, "vllm", "vllm", "serve", {"a": 1.0}))
    assert len(records.read(path).measurements) == 2


def test_a_plan_with_tuples_is_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.resume(path, header(concurrency=(1, 2)))
    assert records.resume(path, header(concurrency=(1, 2))).header.plan["concurrency"] == [1, 2]


def test_another_plan_does_not_go_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.resume(path, header())
    with pytest.raises(RecordsError, match=r"another run \(plan: .*--fresh"):
        records.resume(path, header(rounds=9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no results"),
        ("{}\n", "1: no record"),
        ("[]\n", "1: no record"),
        ("nonsense\n", "1: no record"),
        ('{"kind": "choice"}\n', "1: no record"),
        (
            '{"kind": "failure", "pair": "a", "system": "a", "what": "", "message": "", "log": ""}\n',
            "1: expected a head",
        ),
        (json.dumps({"kind": "header", "machine": {}, "plan": {}, "versions": {}, "format": 99}) + "\n", "format 1"),
    ],
)
def test_what_is_no_results(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(RecordsError, match=expected):
        records.read(path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="cannot read"):
        records.read(tmp_path / "missing.jsonl")
