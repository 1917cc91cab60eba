from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.live import Live, start
from tests.clients.scripted_server import ScriptedServer, Stage, running


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    with running(Stage()) as stage:
        yield stage


@pytest.fixture
def server(stage: Stage) -> ScriptedServer:
    return stage.enter()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with start(tmp_path_factory.mktemp("live")) as live:
        yield live
