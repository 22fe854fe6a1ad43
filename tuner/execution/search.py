"""The search of a sweep: its trials run as slots on a shared base, or each on its own under Ray Tune."""

from __future__ import annotations

from typing import Any

from tuner.execution.engine import Engines
from tuner.execution.events import Display
from tuner.execution.impossible import Impossible
from tuner.execution.machine import Placement
from tuner.execution.places import Places, run_in_places, start_workers
from tuner.execution.trials import Trials
from tuner.execution.waiting import Waiting
from tuner.results.store import Store
from tuner.spec.sharing import most_at_once, why_not_shared
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import milestones


def search(
    store: Store,
    facts: dict[str, Any],
    engines: Engines,
    placement: Placement,
    display: Display,
    strategy: dict[str, Any] | None = None,
    room: dict[str, Any] | None = None,
) -> str | None:
    """Run every trial that is still to be run, until all are over or the time is up; the engines are closed then.

    `facts` is the sweep's `Preparation` as a plain dict; `strategy`, as a plain dict too, is what was `Chosen` where
    trials have workers of Ray Train; by `room`, the `Room` of a worker, points are judged before they start. Returns
    why there were no more trials, where that is not the budget. Raises KeyboardInterrupt after a Ctrl-C, when no trial
    runs any more; those it cut off stay unfinished, for `tuner resume`.
    """
    spec = store.spec
    impossible = Impossible(spec, room, strategy["name"] if strategy else None)
    trials, waiting = Trials(store, facts, display, impossible), Waiting(store, placement, display)
    most = min(placement.most, most_at_once(spec))
    slots, lanes, reason = _slots(spec, facts, engines, most, display)
    count = len(engines.actors) if slots else 0
    store.set_sharing({"slots": slots, "engines": count, "reason": reason, "strategy": strategy})
    if strategy:
        display.stage(f"The workers of a trial share it by {strategy['reason']}")
    display.stage(f"{slots} slots on the shared base ({reason})" if slots else f"Each trial has its own base: {reason}")
    at_once = min(slots * count, most) if slots else placement.concurrent
    display.stage(f"Searching: {trials.remaining} trials, {min(at_once, trials.remaining)} at a time")
    gpus = placement.resources.get("GPU", 0.0)
    trials.halt.gpus_per_trial = gpus / slots if slots else gpus * placement.workers
    ahead = milestones(facts["tokens_per_trial"], spec.budget.evals_per_trial)
    with trials.halt:
        if slots:
            places = Places(engines.actors, slots, most, engines.more)
            run_in_places(trials, places, {**facts, "lanes": lanes}, ahead, waiting)
        engines.close()  # what they hold of the cluster is the dedicated trials' now
        if not slots and strategy is None:
            with start_workers(spec, placement) as places:
                run_in_places(trials, places, facts, ahead, waiting)
        elif strategy:
            from tuner.execution.on_tune import search_on_tune  # Tune and Ray Train take half a second to import
            from tuner.execution.trial import job_of_workers

            job = job_of_workers(spec, facts, placement, strategy["name"])
            search_on_tune(store, trials, job, placement, waiting)
        trials.end_the_rest()
    if trials.halt.interrupted:
        raise KeyboardInterrupt
    return trials.over


def _slots(
    spec: SweepSpec, facts: dict[str, Any], engines: Engines, most: int, display: Display
) -> tuple[int, int, str]:
    """How many slots each engine serves, on how many lanes, and why; none where trials cannot share a base."""
    reasons = why_not_shared(spec)
    if reasons:
        return 0, 0, "; ".join(reasons)
    display.stage("Finding how many trials the shared base serves best")
    return engines.plan(facts, most)
