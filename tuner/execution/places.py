"""Trials in places: a loop in the driver that keeps one call for each waiting in the actor it runs in.

The actor is an engine, with many places, or a process for one trial after the other. Tune would start a process for
every trial, which costs more than a short one does and decides nothing: what to try and what to stop is the study's.
`python -m tests.benchmarks.orchestration` shows what is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from tuner.errors import TunerError
from tuner.execution.alone import Worker
from tuner.execution.endings import explain_failure
from tuner.execution.machine import Placement, live_nodes, others_use_it
from tuner.execution.trials import Trials
from tuner.execution.waiting import Waiting
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, TrialConfig

PATIENCE_S = 0.2
"""How long a Ctrl-C, or the end of the time, may go unnoticed."""
MOST_STARTS = 2
"""So many actors in a row may end before they are up."""
LOOK_S = 2.0
"""How often to look whether the cluster has grown."""
TURN_S = 300.0
"""Where sweeps share a cluster, an actor is kept for its next trial so long; who waits longest has its place then."""


class Places:
    """Actors, each with `seats` for trials and `most` trials in all of them; a seat counts once its actor is up.

    `more`, given the actors there are, starts those for which the cluster has room since. Ray itself places them, so
    one that finds no room waits its turn there, among those of other sweeps. With `turn_s`, an actor that has been up
    for so long ends when it is empty, and another is asked for.
    """

    def __init__(
        self,
        actors: list[Any],
        seats: int = 1,
        most: int | None = None,
        more: Callable[[list[Any]], list[Any]] = lambda actors: [],
        turn_s: float = math.inf,
    ):
        self._seats, self._more, self._turn_s = seats, more, turn_s
        self._limit = self._most = seats * len(actors) if most is None else most
        self._trials: dict[Any, set[int]] = {}
        self._until: dict[Any, float] = {}
        self._coming: dict[ray.ObjectRef, Any] = {}
        self._never_up = 0
        self._look = time.monotonic() + LOOK_S
        for actor in actors:
            self._expect(actor)

    @property
    def coming(self) -> list[ray.ObjectRef]:
        """Calls that return when another actor is up."""
        return list(self._coming)

    @property
    def taken(self) -> int:
        """How many trials are in places."""
        return sum(map(len, self._trials.values()))

    @property
    def at_once(self) -> int:
        """Trials at once when all actors are up."""
        return min(self._most, self._seats * len(self._trials))

    def free(self) -> bool:
        """Whether there is a place for one more trial."""
        return self.taken < self._most and any(len(self._trials[actor]) < self._seats for actor in self._until)

    def take(self, number: int) -> Any:
        """The actor with the fewest trials, which now has this one, too. Only where a place is free."""
        actor = min(self._until, key=lambda actor: len(self._trials[actor]))
        self._trials[actor].add(number)
        return actor

    def holding(self, number: int) -> list[Any]:
        """The actor that has this trial, if any."""
        return [actor for actor, trials in self._trials.items() if number in trials]

    def leave(self, actor: Any, number: int) -> None:
        """A trial is over."""
        if actor in self._trials:
            self._trials[actor].remove(number)
            if not self._trials[actor] and time.monotonic() > self._until.get(actor, math.inf):
                self._end(actor)
                self._look = 0.0

    def doubt(self, actor: Any) -> None:
        """A call has failed with its actor, whose places count again when it is up again, if ever."""
        if self._until.pop(actor, None):
            self._expect(actor)

    def keep(self, trials: int) -> None:
        """So many trials, as far as is known, are still to have a place: the actors for them, and no empty others."""
        self._most = min(self._limit, self.taken + trials)
        for actor in [actor for actor, there in self._trials.items() if not trials and not there]:
            self._end(actor)
        self._welcome()

    def close(self) -> None:
        """End every actor."""
        for actor in list(self._trials):
            self._end(actor)

    def _welcome(self) -> None:
        for call in ray.wait(self.coming, num_returns=len(self.coming), timeout=0)[0] if self._coming else []:
            actor = self._coming.pop(call)
            try:
                ray.get(call)
                self._until[actor], self._never_up = time.monotonic() + self._turn_s, 0
            except RayActorError as error:
                self._end(actor)
                self._count(explain_failure(error))
        if self.at_once < self._most and self._never_up <= MOST_STARTS and time.monotonic() > self._look:
            self._look = time.monotonic() + LOOK_S
            for actor in self._more(list(self._trials)):
                self._expect(actor)

    def _count(self, end: Ending) -> None:
        """Raise TunerError when one actor after the other ends before it is up: nothing would ever run."""
        self._never_up += end.cause != "preempted"
        if self._never_up > MOST_STARTS and not self._until:
            raise TunerError(f"no process for trials stays alive: {end.reason}")

    def _expect(self, actor: Any) -> None:
        self._trials.setdefault(actor, set())
        self._coming[actor.__ray_ready__.remote()] = actor

    def _end(self, actor: Any) -> None:
        ray.kill(actor)
        del self._trials[actor]
        self._until.pop(actor, None)
        self._coming = {call: one for call, one in self._coming.items() if one != actor}


@contextmanager
def start_workers(spec: SweepSpec, placement: Placement) -> Iterator[Places]:
    """An actor for each trial that may run at once, with the resources of its one worker; more when nodes join."""
    actor: Any = ray.remote(Worker).options(
        num_cpus=placement.resources["CPU"],
        num_gpus=placement.resources.get("GPU", 0),
        max_concurrency=2,  # a trial may be ended while a call waits for its next evaluation
    )

    def more(there: list[Any]) -> list[Any]:
        count = placement.wanted(live_nodes())
        return [actor.remote(spec.model_dump(mode="json"), placement.threads) for _ in range(len(there), count)]

    places = Places(more([]), seats=1, most=placement.most, more=more, turn_s=TURN_S if others_use_it() else math.inf)
    try:
        yield places
    finally:
        places.close()


def run_in_places(trials: Trials, places: Places, facts: dict[str, Any], ahead: list[int], waiting: Waiting) -> None:
    """Run trials until there are no more or the search is halted; then some may still be running.

    `ahead` are the token counts of a trial's evaluations.
    """
    running: dict[ray.ObjectRef, Iterator[ray.ObjectRef]] = {}
    while not trials.halt.stop_all():
        for number in trials.steer():
            for actor in places.holding(number):
                actor.detach.remote(number)  # so that the call that its life waits for comes back
        places.keep(trials.remaining)
        while trials.remaining and places.free() and (config := trials.ask()):
            life = _life(trials, places, config, facts, ahead)
            running[next(life)] = life
        if not (trials.remaining or running):
            return
        waiting.note(placed=bool(running))
        done, _ = ray.wait([*running, *places.coming], timeout=PATIENCE_S)
        for call in done:
            if call in running:
                life = running.pop(call)
                if waits_for := next(life, None):
                    running[waits_for] = life
    for call in running:
        ray.cancel(call)  # or Ray would announce that it asks again, when the actor is ended


def _life(
    trials: Trials, places: Places, config: TrialConfig, facts: dict[str, Any], ahead: list[int]
) -> Iterator[ray.ObjectRef]:
    """One attempt of a trial, from evaluation to evaluation; yields every call that it waits for."""
    number = config["number"]
    actor = places.take(number)
    for until_tokens in ahead:
        if until_tokens <= trials.reached(number):
            continue  # it goes on from an evaluation further on
        call = actor.advance.remote(config, facts, until_tokens)
        yield call
        try:
            came_to: Report | Ending = ray.get(call)
        except RayError as error:
            came_to = explain_failure(error)
            places.doubt(actor)
        if isinstance(came_to, Ending):
            trials.failed(number, came_to)
            break
        if trials.reported(number, came_to) or trials.is_cancelled(number):
            break
    yield actor.detach.remote(number)
    places.leave(actor, number)
    trials.ended(number)
