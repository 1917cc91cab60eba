"""Locust users that hold streamed chats; time to first token and inter-token latency are statistics of their own.

`python -m loadtests.run` starts a server, runs this against it and reports. By itself, with Locust's web page:

    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --scenario chat
"""

from __future__ import annotations

import http.client
import itertools
import json
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from locust import User, constant, events, task
from locust.env import Environment

from loadtests.events import Heard, listen
from loadtests.report import Measurements
from loadtests.scenario import Question, Scenario, ScenarioError, load
from loadtests.target import TargetError, check_target

TIMEOUT = 120.0  # seconds without a byte
TROUBLE_PAUSE = 0.5  # seconds after a failed request, so that a dead server is not hammered
MAX_ERROR_BYTES = 1000


class Run:
    """What the users of one run share."""

    def __init__(self, url: str, scenario: Scenario, model: str, api_key: str) -> None:
        self.url = urlsplit(url)
        self.scenario = scenario
        self.headers = {"content-type": "application/json"}
        if api_key:
            self.headers["authorization"] = f"Bearer {api_key}"
        self.model = model or self._first_model()
        self.measured = Measurements(scenario=scenario.name)
        self.started_at = 0.0
        self.user_numbers = itertools.count()

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        return kind(self.url.hostname or "", self.url.port, timeout=TIMEOUT)

    def _first_model(self) -> str:
        connection = self.connect()
        try:
            connection.request("GET", "/v1/models", headers=self.headers)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200:
                raise TargetError(f"GET /v1/models: {_failure(response.status, body)}")
            return str(json.loads(body)["data"][0]["id"])
        finally:
            connection.close()


@events.init_command_line_parser.add_listener
def _add_arguments(parser: ArgumentParser, **_: Any) -> None:
    parser.add_argument("--scenario", default="chat", help="name of a scenario, or the path of its file")
    parser.add_argument("--model", default="", help="model to ask for; by default the server's first")
    parser.add_argument("--api-key", default="", help="key of the server")
    parser.add_argument("--allow-remote", action="store_true", help="permit a server beyond this machine's loopback")
    parser.add_argument("--measurements", default="", help="file that all measurements are written to at the end")


@events.test_start.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    url = environment.host or ""
    try:
        check_target(url, allow_remote=options.allow_remote)
        run = Run(url, load(options.scenario), options.model, options.api_key)
    except (TargetError, ScenarioError, OSError, http.client.HTTPException, ValueError, LookupError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run.started_at = time.perf_counter()
    Chatter.run_of_all = run


@events.test_stop.add_listener
def _end(environment: Environment, **_: Any) -> None:
    run = Chatter.run_of_all
    if run is not None:
        run.measured.seconds = time.perf_counter() - run.started_at


@events.quitting.add_listener
def _write(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    run = Chatter.run_of_all
    if run is not None and options is not None and options.measurements:
        Path(options.measurements).write_text(run.measured.to_json())


class Chatter(User):
    """Holds one conversation after another, as its scenario has it."""

    wait_time = constant(0)
    run_of_all: Run | None = None

    def on_start(self) -> None:
        run = self.run_of_all
        assert run is not None
        self._run = run
        number = next(run.user_numbers)
        run.measured.users = max(run.measured.users, number + 1)
        self._conversations = run.scenario.conversations(number)
        self._connection = run.connect()

    def on_stop(self) -> None:
        self._connection.close()

    @task
    def converse(self) -> None:
        said: list[dict[str, str]] = []
        for question in next(self._conversations):
            heard = self._ask(question, said)
            if heard.error is not None:
                gevent.sleep(TROUBLE_PAUSE)
                return
            said += [{"role": "user", "content": question.text}, {"role": "assistant", "content": heard.text}]
            gevent.sleep(question.pause)

    def _ask(self, question: Question, said: list[dict[str, str]]) -> Heard:
        run, heard = self._run, Heard()
        body = json.dumps(run.scenario.body(question, said, run.model))
        asked_at = time.perf_counter()
        try:
            self._connection.request("POST", "/v1/chat/completions", body, run.headers)
            response = self._connection.getresponse()
            if response.status == 200:
                # Lines end with the stream, whose rest is read so that the connection can be used again.
                listen(heard, iter(response.readline, b""), asked_at=asked_at, clock=time.perf_counter)
                response.read()
            else:
                heard.error = _failure(response.status, response.read(MAX_ERROR_BYTES))
        except (OSError, http.client.HTTPException) as error:
            heard.error = f"{type(error).__name__}: {error}"
        except gevent.GreenletExit:  # the run is over
            run.measured.num_cut_short += 1
            run.measured.add_partly(heard)
            raise
        if heard.error is not None:
            self._connection.close()  # the next request opens it again
        self._report(heard, time.perf_counter() - asked_at)
        return heard

    def _report(self, heard: Heard, latency: float) -> None:
        self._run.measured.add(heard, latency)
        failure = None if heard.error is None else RuntimeError(heard.error)
        self._fire("chat", latency, heard.num_tokens, failure)
        if heard.time_to_first_token is not None:
            self._fire("TTFT", heard.time_to_first_token)
        for gap in heard.gaps:
            self._fire("ITL", gap)

    def _fire(self, kind: str, seconds: float, size: int = 0, failure: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type=kind,
            name=self._run.scenario.name,
            response_time=1e3 * seconds,
            response_length=size,
            exception=failure,
            context={},
        )


def _failure(status: int, body: bytes) -> str:
    """An error answer in one line."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = repr(body[:200])
    return f"status {status}: {message}"
