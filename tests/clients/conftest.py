from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.live import Live, start
from tests.clients.scripted_server import ScriptedServer, running


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as server:
        yield server


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with start(tmp_path_factory.mktemp("live")) as live:
        yield live
