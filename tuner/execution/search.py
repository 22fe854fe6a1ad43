"""The search of a sweep: Ray Tune drives the trials, and what it asks, reports and ends becomes records."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.stopper import Stopper

from tuner.execution.engine import Engines
from tuner.execution.events import Display
from tuner.execution.machine import Placement
from tuner.execution.retention import drop_worse_adapters, keep_best_adapters
from tuner.execution.shared import slot_trial
from tuner.execution.trial import FAILURE, dedicated_trial
from tuner.results.store import Store
from tuner.search.study import Search
from tuner.search.tune import NeverPickled, StudyScheduler, StudySearcher
from tuner.spec.sharing import why_not_shared
from tuner.spec.trial import Ending, Report, TrialConfig


def search(store: Store, facts: dict[str, Any], engines: Engines, placement: Placement, display: Display) -> None:
    """Run every trial that is still to be run, until all are over or the time is up; the engines are closed then.

    `facts` is the sweep's `Preparation` as a plain dict. Raises KeyboardInterrupt after a Ctrl-C, when no trial runs
    any more; those it cut off stay unfinished, for `tuner resume`.
    """
    trials = _Trials(store, facts, display)
    remaining = trials.search.remaining
    # The coordinator of a trial only waits; its workers, or the engine, take the CPUs. Tune insists on some resource.
    coordinator = tune.PlacementGroupFactory([{"memory": 1}])
    with _way_to_run(store, facts, engines, placement, display) as (trainable, concurrent, reuse), trials.halt:
        display.stage(f"Searching: {remaining} trials, {concurrent} at a time")
        tune.Tuner(
            tune.with_resources(trainable, coordinator),
            tune_config=tune.TuneConfig(
                search_alg=StudySearcher(trials.ask, trials.ended),
                scheduler=StudyScheduler(trials.take),
                num_samples=remaining,
                max_concurrent_trials=concurrent,
                reuse_actors=reuse,
            ),
            run_config=tune.RunConfig(
                name=f"run-{time.time_ns()}",  # a name used before would silently resume that run
                storage_path=str(store.folder.ray),
                stop=trials.halt,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # adapters are saved by the trials
                verbose=0,
            ),
        ).fit()
        trials.end_the_rest()
    if trials.halt.interrupted:
        raise KeyboardInterrupt


@contextmanager
def _way_to_run(
    store: Store, facts: dict[str, Any], engines: Engines, placement: Placement, display: Display
) -> Iterator[tuple[Any, int, bool]]:
    """The trainable for the sweep's trials, how many run at once, and whether one's process may serve the next."""
    spec, limit = store.spec, store.spec.resources.max_concurrent_trials or store.spec.budget.trials
    reasons = why_not_shared(spec)
    if not reasons:
        display.stage("Finding how many trials the shared base serves best")
        slots, reason = engines.plan(facts)
        if slots:
            count = len(engines.actors)
            store.set_sharing({"slots": slots, "engines": count, "reason": reason})
            display.stage(f"{slots} slots on the shared base ({reason})")
            yield slot_trial(engines, spec, facts), min(slots * count, limit), True
            engines.close()
            return
        reasons = [reason]
    engines.close()  # what it holds of the cluster is the trials' now
    store.set_sharing({"slots": 0, "engines": 0, "reason": "; ".join(reasons)})
    display.stage(f"Each trial has a base of its own: {'; '.join(reasons)}")
    job = {
        "spec": spec.model_dump(mode="json"),
        "preparation": facts,
        "workers": placement.workers,
        "resources": placement.resources,
        "threads": placement.threads,
    }
    yield tune.with_parameters(dedicated_trial, job=job), placement.concurrent, False


class _Trials:
    """The trials of a running sweep: what Tune asks, reports and ends, turned into records and decisions."""

    def __init__(self, store: Store, facts: dict[str, Any], display: Display):
        self.search = Search(store.spec, store.study, facts["tokens_per_trial"])
        self.halt = _Halt(store, display)
        self._store = store
        self._display = display
        self._running: set[int] = set()
        self._failures: dict[int, Ending] = {}

    def ask(self) -> TrialConfig | None:
        if self.halt.stop_all():
            return None
        config = self.search.ask()
        if config is not None:
            number = config["number"]
            shutil.rmtree(self._store.folder.trial(number), ignore_errors=True)  # what an earlier attempt left
            self._store.start_trial(number, config)
            self._running.add(number)
            self._display.trial_started(number, config["point"])
        return config

    def take(self, number: int, result: dict[str, Any]) -> bool:
        if FAILURE in result:
            self._failures[number] = Ending(**json.loads(result[FAILURE]))
            return False
        report = Report.from_dict({**result, "adapter_path": result["checkpoint_path"]})
        self._store.add_report(number, report)
        drop_worse_adapters(self._store, number)
        self._display.trial_reported(number, report)
        return self.search.report(number, report)

    def ended(self, number: int) -> None:
        self._running.discard(number)
        failure = self._failures.get(number)
        if self.halt.interrupted and not self.search.is_decided(number):
            return  # whatever it was: it stays unfinished, for `tuner resume`
        if self.halt.reason and failure is None:
            failure = Ending("STOPPED", "time limit", self.halt.reason)
        ending = self.search.ending(number, failure)
        self._store.finish_trial(number, ending.outcome, ending.cause, ending.reason, ending.log_tail)
        self.search.tell(number, ending)
        keep_best_adapters(self._store)
        self._display.trial_finished(self._store.record(number))

    def end_the_rest(self) -> None:
        """Trials that Tune ended all at once, when it was told to stop: of these it says nothing to its searcher."""
        for number in sorted(self._running):
            self.ended(number)


class _Halt(NeverPickled, Stopper):
    """Ends the search between two results: on the first Ctrl-C, a cancellation, or when the time is up."""

    def __init__(self, store: Store, display: Display):
        self._limit = store.spec.budget.time_limit
        self._deadline = time.monotonic() + self._limit - store.status().elapsed_s if self._limit else None
        self._display = display
        self.interrupted = False
        self.reason: str | None = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def __exit__(self, *exc_info: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, signum: int, frame: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._previous)  # a second Ctrl-C does not wait

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.reason is None:
            if self.interrupted:
                self.reason = "interrupted"
            elif self._deadline is not None and time.monotonic() > self._deadline:
                self.reason = f"budget.time_limit of {self._limit:g} s"
            if self.reason:
                self._display.stage(f"Ending what runs: {self.reason}")
        return self.reason is not None
