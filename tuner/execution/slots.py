"""Trials as slots on a shared base: a loop in the driver that keeps one call for each waiting in an engine.

Tune would start a process for every slot, which costs more than a short trial does and decides nothing: what to try and
what to stop is the study's. `python -m tests.benchmarks.orchestration` shows what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError

from tuner.errors import NotShareable
from tuner.execution.endings import explain_failure
from tuner.execution.trials import Trials
from tuner.spec.trial import Ending, Report, TrialConfig

PATIENCE_S = 0.2
"""How long a Ctrl-C, or the end of the time, may go unnoticed."""


def run_slots(trials: Trials, engines: list[Any], facts: dict[str, Any], ahead: list[int], slots: int) -> None:
    """Run trials, so many at once, until there are no more or the search is halted; then some may still be running.

    `ahead` are the token counts of a trial's evaluations. A trial that cannot share is put off.
    """
    running: dict[ray.ObjectRef, Iterator[ray.ObjectRef]] = {}
    while not trials.halt.stop_all():
        while len(running) < slots and (config := trials.ask()):
            life = _life(trials, engines[config["number"] % len(engines)], config, facts, ahead)
            running[next(life)] = life
        if not running:
            return
        done, _ = ray.wait(list(running), timeout=PATIENCE_S)
        for call in done:
            life = running.pop(call)
            if waits_for := next(life, None):
                running[waits_for] = life


def _life(
    trials: Trials, engine: Any, config: TrialConfig, facts: dict[str, Any], ahead: list[int]
) -> Iterator[ray.ObjectRef]:
    """One trial, from evaluation to evaluation; yields every call that it waits for."""
    yield from _training(trials, engine, config, facts, ahead)
    yield engine.detach.remote(config["number"])


def _training(
    trials: Trials, engine: Any, config: TrialConfig, facts: dict[str, Any], ahead: list[int]
) -> Iterator[ray.ObjectRef]:
    number = config["number"]
    for until_tokens in ahead:
        call = engine.advance.remote(config, facts, until_tokens)
        yield call
        came_to = _outcome(call)
        if isinstance(came_to, NotShareable):
            trials.put_off(number, str(came_to))
            return
        if isinstance(came_to, Ending):
            trials.failed(number, came_to)
            break
        if trials.reported(number, came_to):
            break
    trials.ended(number)


def _outcome(call: ray.ObjectRef) -> Report | Ending | NotShareable:
    try:
        return ray.get(call)
    except RayActorError as error:  # Ray has asked again, as often as an engine's death is survived
        return explain_failure(error)
