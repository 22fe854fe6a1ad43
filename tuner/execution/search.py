"""The search of a sweep: its trials run as slots on a shared base, or each on its own under Ray Tune."""

from __future__ import annotations

import json
import time
from typing import Any

from ray import tune
from ray.tune.stopper import Stopper

from tuner.execution.alone import start_workers
from tuner.execution.engine import Engines
from tuner.execution.events import Display
from tuner.execution.machine import Placement
from tuner.execution.places import run_in_places
from tuner.execution.trial import FAILURE, dedicated_trial
from tuner.execution.trials import Halt, Trials
from tuner.results.store import Store
from tuner.search.tune import NeverPickled, StudyScheduler, StudySearcher
from tuner.spec.sharing import why_not_shared
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Ending, Report, milestones


def search(store: Store, facts: dict[str, Any], engines: Engines, placement: Placement, display: Display) -> None:
    """Run every trial that is still to be run, until all are over or the time is up; the engines are closed then.

    `facts` is the sweep's `Preparation` as a plain dict. Raises KeyboardInterrupt after a Ctrl-C, when no trial runs
    any more; those it cut off stay unfinished, for `tuner resume`.
    """
    spec = store.spec
    trials = Trials(store, facts, display)
    slots, reason = _slots(spec, facts, engines, display)
    count = len(engines.actors) if slots else 0
    store.set_sharing({"slots": slots, "engines": count, "reason": reason})
    places = (engines.actors * slots)[: spec.resources.max_concurrent_trials]
    display.stage(f"{slots} slots on the shared base ({reason})" if slots else f"Each trial has its own base: {reason}")
    at_once = min(len(places) or placement.concurrent, trials.remaining)
    display.stage(f"Searching: {trials.remaining} trials, {at_once} at a time")
    ahead = milestones(facts["tokens_per_trial"], spec.budget.evals_per_trial)
    with trials.halt:
        if slots:
            run_in_places(trials, places, facts, ahead)
        engines.close()  # what they hold of the cluster is the dedicated trials' now
        if not slots and placement.workers == 1:
            with start_workers(spec, placement) as workers:
                run_in_places(trials, workers, facts, ahead)
        elif not slots:
            _search_on_tune(store, trials, facts, placement)
        trials.end_the_rest()
    if trials.halt.interrupted:
        raise KeyboardInterrupt


def _slots(spec: SweepSpec, facts: dict[str, Any], engines: Engines, display: Display) -> tuple[int, str]:
    """How many slots each engine serves, and why; none where trials cannot share a base."""
    reasons = why_not_shared(spec)
    if reasons:
        return 0, "; ".join(reasons)
    display.stage("Finding how many trials the shared base serves best")
    return engines.plan(facts)


def _search_on_tune(store: Store, trials: Trials, facts: dict[str, Any], placement: Placement) -> None:
    """Run trials of several workers each, as Tune starts and stops them."""
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
