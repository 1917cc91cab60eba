from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.errors import SourceError
from engine.weights.files import lock, need_space, publish, writing


def test_space_is_compared_with_what_is_free(tmp_path: Path) -> None:
    need_space(tmp_path, 1000, "packing x", free=lambda folder: 1000)
    with pytest.raises(SourceError, match=rf"no space left in {tmp_path}: packing x needs 2\.5 MB, 1\.0 MB are free"):
        need_space(tmp_path, 2_500_000, "packing x", free=lambda folder: 1_000_000)


def test_a_disk_that_fills_up_says_what_was_needed(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceError, match=r"no space left in .*: packing x needs 7\.0 MB, [0-9.]+ MB are free"),
        writing(tmp_path, 7_000_000, "packing x"),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")


def test_other_failures_say_what_was_being_done(tmp_path: Path) -> None:
    with (
        pytest.raises(SourceError, match=r"packing x in .* failed: No such file or directory"),
        writing(tmp_path, 0, "packing x"),
    ):
        (tmp_path / "no" / "where").write_bytes(b"")


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with (
        pytest.raises(SourceError, match=r"packing x in .* failed: "),
        lock(tmp_path / "home/packed/x.lock", "packing x"),
    ):
        pytest.fail("the lock cannot be there")


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    inside = 0
    most = 0
    entered: list[int] = []

    def enter(i: int) -> None:
        nonlocal inside, most
        for _ in range(20):
            with lock(tmp_path / "a.lock", "testing"):
                inside += 1
                most = max(most, inside)
                entered.append(i)
                inside -= 1

    threads = [threading.Thread(target=enter, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(entered) == 80


def test_a_failure_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path / "a.lock", "testing"):
        raise KeyError
    with lock(tmp_path / "a.lock", "testing"):
        pass


def test_publish_replaces_whole_files(tmp_path: Path) -> None:
    target, temporary = tmp_path / "target", tmp_path / "temporary"
    target.write_text("old")
    temporary.write_text("new")
    publish(temporary, target)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
