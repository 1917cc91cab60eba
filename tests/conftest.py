from __future__ import annotations

import io
import logging
import signal
import sys
from collections.abc import Callable, Iterator

import hypothesis  # noqa: F401  CPython 3.11 fails to import it beneath a failing test, where its own plugin would
import pytest

from engine import logs
from engine.config import DEFAULT_MODEL
from engine.weights import PackedModel, load_model
from tests import live


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine", choices=("native", "vllm"), default="native", help="what computes for servers that tests start"
    )


def pytest_configure(config: pytest.Config) -> None:
    live.ENGINE = config.getoption("--engine")
    # A shell without job control starts what it puts in the background with SIGINT ignored, and so would every child
    # that the tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what asks vLLM for what it lacks, by the marker `native`, and what needs vLLM, without it."""
    for item in items:
        marker = item.get_closest_marker("native" if live.ENGINE == "vllm" else "vllm")
        if marker is not None:
            item.add_marker(pytest.mark.skip(reason=marker.args[0] if marker.args else "runs with `make test-vllm`"))


@pytest.fixture(scope="session")
def default_model() -> PackedModel:
    """The default model's packed file, mapped; fetched into the models' folder the first time."""
    return load_model(DEFAULT_MODEL)


ConfigureLogs = Callable[[str, str], io.StringIO]


@pytest.fixture
def configure_logs() -> Iterator[ConfigureLogs]:
    """`logs.configure` with a stream to read, undone afterwards."""
    root = logging.getLogger()
    names = ["", *logs.OURS]
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, hook = root.handlers[:], sys.excepthook
    root.handlers = []  # pytest's own, which `configure` would close

    def configured(level: str, format: str) -> io.StringIO:
        stream = io.StringIO()
        logs.configure(level, format, stream)
        return stream

    yield configured
    logging.captureWarnings(False)
    root.handlers, sys.excepthook = handlers, hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
