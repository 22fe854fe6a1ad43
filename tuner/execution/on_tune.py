"""Trials of several workers each, under Ray Tune: it starts them, passes on what they report, and stops them."""

from __future__ import annotations

import json
import time
from typing import Any

from ray import tune
from ray.tune.stopper import Stopper

from tuner.execution.machine import Placement
from tuner.execution.trial import FAILURE, dedicated_trial
from tuner.execution.trials import Halt, Trials
from tuner.results.store import Store
from tuner.search.tune import NeverPickled, StudyScheduler, StudySearcher
from tuner.spec.trial import Ending, Report


def search_on_tune(store: Store, trials: Trials, facts: dict[str, Any], placement: Placement) -> None:
    """Run trials until there are no more or the search is halted. `facts` is the sweep's `Preparation` as a dict."""
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
