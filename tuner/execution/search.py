"""The search of a sweep: its trials run as slots on a shared base, or each on its own under Ray Tune."""

from __future__ import annotations

import json
import time
from typing import Any

from ray import tune
from ray.tune.stopper import Stopper

from tuner.execution.engine import Engines
from tuner.execution.events import Display
from tuner.execution.machine import Placement
from tuner.execution.slots import run_slots
from tuner.execution.trial import FAILURE, dedicated_trial
from tuner.execution.trials import Halt, Trials
from tuner.results.store import Store
from tuner.search.tune import NeverPickled, StudyScheduler, StudySearcher
from tuner.spec.sharing import why_not_shared
from tuner.spec.trial import Ending, Report, milestones


def search(store: Store, facts: dict[str, Any], engines: Engines, placement: Placement, display: Display) -> None:
    """Run every trial that is still to be run, until all are over or the time is up; the engines are closed then.

    `facts` is the sweep's `Preparation` as a plain dict. Raises KeyboardInterrupt after a Ctrl-C, when no trial runs
    any more; those it cut off stay unfinished, for `tuner resume`.
    """
    trials = Trials(store, facts, display)
    with trials.halt:
        reasons = why_not_shared(store.spec) or _search_shared(store, trials, facts, engines, display)
        engines.close()  # what they hold of the cluster is the other trials' now
        if reasons:
            store.set_sharing({"slots": 0, "engines": 0, "reason": "; ".join(reasons)})
            display.stage(f"Each trial has a base of its own: {'; '.join(reasons)}")
        trials.take_up()
        if trials.remaining and not trials.halt.stop_all():
            _search_dedicated(store, trials, facts, placement, display)
        trials.end_the_rest()
    if trials.halt.interrupted:
        raise KeyboardInterrupt


def _search_shared(
    store: Store, trials: Trials, facts: dict[str, Any], engines: Engines, display: Display
) -> list[str]:
    """Run what can share a base; returns why nothing can, where that turns out only now."""
    display.stage("Finding how many trials the shared base serves best")
    slots, reason = engines.plan(facts)
    if not slots:
        return [reason]
    spec, count = store.spec, len(engines.actors)
    store.set_sharing({"slots": slots, "engines": count, "reason": reason})
    display.stage(f"{slots} slots on the shared base ({reason})")
    concurrent = min(slots * count, spec.resources.max_concurrent_trials or spec.budget.trials)
    display.stage(f"Searching: {trials.remaining} trials, {concurrent} at a time")
    ahead = milestones(facts["tokens_per_trial"], spec.budget.evals_per_trial)
    run_slots(trials, engines.actors, facts, ahead, concurrent)
    return []


def _search_dedicated(
    store: Store, trials: Trials, facts: dict[str, Any], placement: Placement, display: Display
) -> None:
    """Run trials that have workers of their own, as Tune starts and stops them."""
    job = {
        "spec": store.spec.model_dump(mode="json"),
        "preparation": facts,
        "workers": placement.workers,
        "resources": placement.resources,
        "threads": placement.threads,
    }
    # The coordinator of a trial only waits; its workers take the CPUs. Tune insists on some resource.
    coordinator = tune.PlacementGroupFactory([{"memory": 1}])

    def take(number: int, result: dict[str, Any]) -> bool:
        if FAILURE in result:
            trials.failed(number, Ending(**json.loads(result[FAILURE])))
            return False
        return trials.reported(number, Report.from_dict({**result, "adapter_path": result["checkpoint_path"]}))

    display.stage(f"Searching: {trials.remaining} trials, {placement.concurrent} at a time")
    tune.Tuner(
        tune.with_resources(tune.with_parameters(dedicated_trial, job=job), coordinator),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(trials.ask, trials.ended),
            scheduler=StudyScheduler(take),
            num_samples=trials.remaining,
            max_concurrent_trials=placement.concurrent,
        ),
        run_config=tune.RunConfig(
            name=f"run-{time.time_ns()}",  # a name used before would silently resume that run
            storage_path=str(store.folder.ray),
            stop=_TuneStopper(trials.halt),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # adapters are saved by the trials
            verbose=0,
        ),
    ).fit()


class _TuneStopper(NeverPickled, Stopper):
    """The halt of the search, as Tune asks for it."""

    def __init__(self, halt: Halt):
        self._halt = halt

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._halt.stop_all()
