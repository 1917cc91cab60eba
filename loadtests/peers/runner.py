"""The run itself: turn after turn, each finished measurement written down before the next one starts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from loadtests.peers import plan, records
from loadtests.peers.plan import OURS, Task, Turn
from loadtests.peers.processes import SystemFailure
from loadtests.peers.systems import Figures, Place, Setting, System

MAX_FAILURES = 2
"""Turns of a system against a peer that may fail in a row; then what is left of that pair is skipped."""

TRIALS = 2
"""Of each setting, in turn; the best counts, because what else the machine does can only slow them down."""


class Runner:
    """Measures turns and keeps the books. `say` gets a line of progress; `clock` gives seconds that only grow."""

    def __init__(
        self,
        systems: Mapping[str, System],
        places: Mapping[str, Place],
        path: Path,
        results: records.Results,
        *,
        seconds: float,
        trials: int = TRIALS,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.systems, self.places = systems, places
        self.path, self.results = path, results
        self.trials, self.say, self.clock = trials, say, clock
        self.deadline = clock() + seconds
        self.seconds = seconds
        self.failures: Counter[tuple[str, str]] = Counter()
        self.warmed: set[tuple[str, str, str]] = set()

    def run(self, turns: Iterable[Turn]) -> bool:
        """Measure what is not measured yet. Whether all of it is."""
        todo = [turn for turn in turns if not self._done(turn)]
        for number, turn in enumerate(todo, 1):
            if self._given_up(turn.pair):
                continue
            if self.clock() > self.deadline:
                left = len(todo) - number + 1
                self.say(
                    f"stopped after {self.seconds / 60:.0f} minutes with {left} turns left; the same command goes on"
                )
                return False
            names = ", ".join(task.name for task in turn.tasks)
            self.say(f"[{number}/{len(todo)}] round {turn.round + 1}, {turn.system} beside {turn.pair}: {names}")
            begin = self.clock()
            try:
                self._measure(turn)
            except SystemFailure as failure:
                self._failed(turn, names, failure)
            else:
                self.failures[turn.pair, turn.system] = 0
                self.say(f"    {self.clock() - begin:.0f} s")
        return not self.results.failures

    def fail(self, pair: str, failure: SystemFailure, what: str) -> None:
        """Write down that a peer cannot be measured at all, and skip it."""
        self.failures[pair, pair] = MAX_FAILURES
        self._note(pair, pair, what, failure)

    def _done(self, turn: Turn) -> bool:
        return all(self.results.has(turn.round, turn.pair, turn.system, task.name) for task in turn.tasks)

    def _given_up(self, pair: str) -> bool:
        return max(self.failures[pair, pair], self.failures[pair, OURS]) >= MAX_FAILURES

    def _failed(self, turn: Turn, names: str, failure: SystemFailure) -> None:
        self.failures[turn.pair, turn.system] += 1
        self._note(turn.pair, turn.system, names, failure)
        if self._given_up(turn.pair):
            self.say(f"    {turn.pair} is skipped from here on")

    def _note(self, pair: str, system: str, what: str, failure: SystemFailure) -> None:
        record = records.Failure(pair=pair, system=system, what=what, message=str(failure), log=failure.log)
        self._write(record)
        self.say(f"    failed: {system}: {what}: {failure}")
        for line in failure.log.splitlines():
            self.say(f"    | {line}")

    def _write(self, record: records.Record) -> None:
        records.write(self.path, record)
        self.results.add(record)

    def _measure(self, turn: Turn) -> None:
        setting = self._setting(turn)
        key = (turn.pair, turn.system, turn.tasks[0].kind)
        if key not in self.warmed:
            # The first start of a system compiles, packs or reads what later ones find ready; it is not counted.
            self._ask(turn, [turn.tasks[0].trial()], setting)
            self.warmed.add(key)
        for name, figures in self._ask(turn, turn.tasks, setting).items():
            self._write(
                records.Measurement(
                    round=turn.round,
                    pair=turn.pair,
                    system=turn.system,
                    task=name,
                    setting=setting.label,
                    figures=figures,
                )
            )
            shown = (f"{key} {value:.4g}" for key, value in figures.items() if key.startswith("tokens_per_second"))
            self.say(f"    {name}: {', '.join(shown)}")

    def _ask(self, turn: Turn, tasks: Sequence[Task], setting: Setting) -> Mapping[str, Figures]:
        over_http = self.systems[turn.pair].over_http
        return self.systems[turn.system].measure(tasks, setting, self.places[turn.system], over_http=over_http)

    def _setting(self, turn: Turn) -> Setting:
        """The setting that was found fastest for the turn's family of tasks, by short trials of all candidates in turn
        where that is not known yet. Ours is the same beside every peer."""
        task = turn.tasks[0]
        candidates = self.systems[turn.system].settings(task.family, self.places[turn.system])
        if len(candidates) == 1:
            return candidates[0]
        known = self.results.choice(None if turn.system == OURS else turn.pair, turn.system, task.family)
        if known is None:
            known = self._choose(turn, candidates)
        return next(setting for setting in candidates if setting.label == known.chosen)

    def _choose(self, turn: Turn, candidates: Sequence[Setting]) -> records.Choice:
        task = turn.tasks[0].trial()
        rates: dict[str, list[float]] = {setting.label: [] for setting in candidates}
        failed: dict[str, SystemFailure] = {}
        # A session of a server begins with a start that may take minutes, so one has to do.
        for _ in range(1 if self.systems[turn.system].over_http else self.trials):
            for setting in candidates:
                if setting.label in failed:
                    continue
                try:
                    figures = self._ask(turn, [task], setting)[task.name]
                except SystemFailure as failure:
                    failed[setting.label] = failure
                    self._note(turn.pair, turn.system, f"trial of {setting.label} for {task.family}", failure)
                    continue
                rates[setting.label].append(score(figures))
        if len(failed) == len(candidates):
            raise next(iter(failed.values()))
        trials = {label: 0.0 if label in failed else max(values) for label, values in rates.items()}
        chosen = max(trials, key=lambda label: trials[label])
        choice = records.Choice(pair=turn.pair, system=turn.system, family=task.family, chosen=chosen, trials=trials)
        self._write(choice)
        shown = ", ".join(f"{label} {rate:.4g}" for label, rate in trials.items())
        self.say(f"    setting for {task.family}: {chosen} ({shown} tokens/s)")
        return choice


def score(figures: Figures) -> float:
    """What settings are compared by: tokens per second."""
    return max(value for name, value in figures.items() if name.startswith("tokens_per_second"))


def groups(systems: Iterable[System], tasks: Sequence[Task]) -> dict[str, list[tuple[Task, ...]]]:
    """For each peer, the tasks that are measured in one go: all in one session of its server, or each by itself."""
    return {
        system.name: [tuple(tasks)] if system.over_http else [(task,) for task in tasks]
        for system in systems
        if system.name != plan.OURS
    }
