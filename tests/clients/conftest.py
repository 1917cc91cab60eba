from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.clients.scripted_server import ScriptedServer, Stage, running

if TYPE_CHECKING:
    from tests.clients.live import Live


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    with running(Stage()) as stage:
        yield stage


@pytest.fixture
def server(stage: Stage) -> ScriptedServer:
    return stage.enter()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    from tests.clients.live import start  # once `pytest --engine` is known, which this file is read before

    with start(tmp_path_factory.mktemp("live")) as live:
        yield live
