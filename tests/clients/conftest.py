from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.scripted_server import ScriptedServer, running


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with running(ScriptedServer()) as server:
        yield server
