from __future__ import annotations

import socket
from pathlib import Path

import pytest

from loadtests import run
from loadtests.target import TargetError, check_target
from tests.clients.scripted_server import ScriptedServer, fail, respond, running


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:1", "http://[::1]:80", "https://127.1.2.3"])
def test_loopback_is_fine(url: str) -> None:
    check_target(url, allow_remote=False)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8000", "http://example.org", "https://[2001:db8::1]", "http://0.0.0.0"]
)
def test_other_machines_must_be_allowed(url: str) -> None:
    with pytest.raises(TargetError, match="another machine"):
        check_target(url, allow_remote=False)
    check_target(url, allow_remote=True)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://h:port", "http://[::1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(TargetError, match="must be http://host:port"):
        check_target(url, allow_remote=True)


def test_wrong_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--url", "http://10.1.2.3:8000"]) == 2
    assert "--allow-remote" in capsys.readouterr().err
    assert run.main(["--scenario", "nope"]) == 2
    assert "scenario must be one of chat" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--users=0", "--users=513", "--seconds=3601", "--seconds=x", "--frob"])
def test_users_and_time_are_bounded(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main([argument])
    assert caught.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


def test_waiting_until_ready() -> None:
    with running(ScriptedServer()) as server:
        server.script(fail(503), fail(503), respond({"status": "ready"}))
        run.wait_until_ready(server.url, seconds=30)
        assert [seen.path for seen in server.seen] == ["/health/ready"] * 3


def test_a_server_that_never_gets_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(run.RunError, match=r"was not ready within 0\.2 s; last it said ConnectError"):
        run.wait_until_ready(f"http://127.0.0.1:{port}", seconds=0.2)


def test_a_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(run.RunError, match="the server did not start"),
        run.own_server([str(tmp_path / "missing.gguf")], api_key=""),
    ):
        raise AssertionError("it must not start")
