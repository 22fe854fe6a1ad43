"""Trials of several workers each, under Ray Tune: it starts them, passes on what they report, and stops them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.stopper import Stopper

from tuner.execution.halt import Halt
from tuner.execution.machine import Placement, live_nodes
from tuner.execution.trial import FAILURE, PLACED, dedicated_trial
from tuner.execution.trials import Trials
from tuner.execution.waiting import PATIENCE_S, Waiting
from tuner.results.store import Store
from tuner.search.tune import NeverPickled, StudyScheduler, StudySearcher
from tuner.spec.trial import Ending, Report, TrialConfig


def search_on_tune(store: Store, trials: Trials, job: dict[str, Any], placement: Placement, waiting: Waiting) -> None:
    """Run trials until there are no more or the search is halted. `job` is what their workers are told."""
    # The coordinator of a trial only waits; its workers take the CPUs. Tune insists on some resource. It is where the
    # driver is, on a node that lasts, and Ray Train keeps its controller beside it.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    coordinator = tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[here])
    groups = Groups(placement)

    def ask() -> TrialConfig | None:
        config = trials.ask()
        if config is not None:
            groups.asked(config["number"])
        return config

    def take(number: int, result: dict[str, Any]) -> bool:
        if PLACED in result:
            groups.placed(number)
            return False
        if FAILURE in result:
            trials.failed(number, Ending(**json.loads(result[FAILURE])))
            return False
        return trials.reported(number, Report.from_dict(result))

    def ended(number: int) -> None:
        groups.ended(number)
        trials.ended(number)

    def look() -> None:
        waiting.note(groups.any_placed)
        for number in trials.steer():
            scheduler.stop(number)

    scheduler = StudyScheduler(take)
    tune.Tuner(
        tune.with_resources(tune.with_parameters(dedicated_trial, job=job), coordinator),
        tune_config=tune.TuneConfig(
            search_alg=StudySearcher(ask, ended, groups.room),
            scheduler=scheduler,
            num_samples=-1,  # until there is no other trial to ask for
        ),
        run_config=tune.RunConfig(
            name=f"run-{time.time_ns()}",  # a name used before would silently resume that run
            storage_path=str(store.folder.ray),
            stop=_TuneStopper(trials.halt, look),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # adapters are saved by the trials
            verbose=0,
        ),
    ).fit()


class Groups:
    """The worker groups of trials, which Tune cannot see: a trial is asked for when its group has a chance to start.

    Ray reserves a group as a whole or not at all, so trials and sweeps that compete never hold halves. A group that
    finds no room waits its turn among those of other sweeps.
    """

    def __init__(self, placement: Placement):
        self._placement = placement
        self._waiting: dict[int, float] = {}
        self._running: set[int] = set()

    def asked(self, number: int) -> None:
        self._waiting[number] = time.monotonic()

    def placed(self, number: int) -> None:
        self._waiting.pop(number, None)
        self._running.add(number)

    def ended(self, number: int) -> None:
        self._waiting.pop(number, None)
        self._running.discard(number)

    @property
    def any_placed(self) -> bool:
        """Whether the workers of any trial run."""
        return bool(self._running)

    def room(self) -> bool:
        """Whether to ask for one more trial: on the nodes of this moment, unless one has waited long.

        Where nodes may join, one may always wait: it is what an autoscaler starts them for.
        """
        there, most = len(self._running) + len(self._waiting), self._placement.most
        if not there or (self._placement.ahead and not self._waiting):
            return there < most
        stuck = any(time.monotonic() - asked > PATIENCE_S for asked in self._waiting.values())
        return not stuck and there < min(most, self._placement.fits(live_nodes()))


class _TuneStopper(NeverPickled, Stopper):
    """The halt of the search, as Tune asks for it."""

    def __init__(self, halt: Halt, look: Callable[[], None]):
        self._halt = halt
        self._look = look

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Asked at every turn of Tune's loop."""
        self._look()
        return self._halt.stop_all()
