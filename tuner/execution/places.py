"""Trials in places: a loop in the driver that keeps one call for each waiting in the actor it runs in.

The actor is an engine, with many places, or a process for one trial after the other. Tune would start a process for
every trial, which costs more than a short one does and decides nothing: what to try and what to stop is the study's.
`python -m tests.benchmarks.orchestration` shows what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError

from tuner.execution.endings import explain_failure
from tuner.execution.trials import Trials
from tuner.spec.trial import Ending, Report, TrialConfig

PATIENCE_S = 0.2
"""How long a Ctrl-C, or the end of the time, may go unnoticed."""


def run_in_places(trials: Trials, places: list[Any], facts: dict[str, Any], ahead: list[int]) -> None:
    """Run trials until there are no more or the search is halted; then some may still be running.

    `places` names an actor for every trial that may run at once; `ahead` are the token counts of a trial's evaluations.
    """
    running: dict[ray.ObjectRef, Iterator[ray.ObjectRef]] = {}
    while not trials.halt.stop_all():
        while places and (config := trials.ask()):
            life = _life(trials, places, config, facts, ahead)
            running[next(life)] = life
        if not running:
            return
        done, _ = ray.wait(list(running), timeout=PATIENCE_S)
        for call in done:
            life = running.pop(call)
            if waits_for := next(life, None):
                running[waits_for] = life
    for call in running:
        ray.cancel(call)  # or Ray would announce that it asks again, when the actor is ended


def _life(
    trials: Trials, places: list[Any], config: TrialConfig, facts: dict[str, Any], ahead: list[int]
) -> Iterator[ray.ObjectRef]:
    """One trial, from evaluation to evaluation; yields every call that it waits for."""
    number, actor = config["number"], places.pop(0)
    reached = 0
    for until_tokens in ahead:
        if until_tokens <= reached:
            continue  # it went on from an evaluation further on, after which it was cut off
        call = actor.advance.remote(config, facts, until_tokens)
        yield call
        came_to = _outcome(call)
        if isinstance(came_to, Ending):
            trials.failed(number, came_to)
            break
        reached = came_to.tokens
        if trials.reported(number, came_to):
            break
    trials.ended(number)
    yield actor.detach.remote(number)
    places.append(actor)


def _outcome(call: ray.ObjectRef) -> Report | Ending:
    try:
        return ray.get(call)
    except RayActorError as error:  # Ray has asked again, as often as the actor's death is survived
        return explain_failure(error)
