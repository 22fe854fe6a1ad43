"""A sweep from its spec to its promoted model: Ray Tune drives the trials, the store remembers, the display watches."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ray import tune
from ray.tune.stopper import Stopper

from tuner.errors import PromotionRefused, TunerError
from tuner.execution.events import Display, Silent
from tuner.execution.logs import library_output_to
from tuner.execution.machine import Placement, place, ray_cluster
from tuner.execution.preparation import prepare_on_ray
from tuner.execution.promote import promote_trial
from tuner.execution.retention import drop_worse_adapters, keep_best_adapters
from tuner.execution.trial import FAILURE, dedicated_trial
from tuner.results.ranking import best_trial
from tuner.results.record import TrialRecord
from tuner.results.store import Store
from tuner.search.study import Ending, Search
from tuner.search.tune import NeverPickled, StudyScheduler, StudySearcher
from tuner.spec.layout import SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report, TrialConfig

HEARTBEAT_S = 15.0


def run_sweep(spec: SweepSpec, display: Display | None = None, log_output: bool = False) -> Store:
    """Run a new sweep to its end. Returns its store; see `_drive` for what is raised.

    With `log_output`, everything the libraries print goes to the sweep's log meanwhile.
    """
    Store.refuse_existing(spec)
    display = display or Silent()
    display.stage("Starting Ray")
    with ray_cluster() as cluster:
        placement = place(spec, cluster)
        return _drive(Store.create(spec), placement, display, log_output)


def resume_sweep(folder: SweepFolder, display: Display | None = None, log_output: bool = False) -> Store:
    """Go on with a sweep that was cut off: finished trials stay, unfinished ones run again under their numbers."""
    store = Store.open(folder)
    status = store.status().status
    if status in ("preparing", "running"):
        raise TunerError(f"sweep {folder.name!r} is running already")
    if status == "finished":
        raise TunerError(f"sweep {folder.name!r} is finished: nothing to resume")
    display = display or Silent()
    display.stage("Starting Ray")
    with ray_cluster() as cluster:
        return _drive(store, place(store.spec, cluster), display, log_output)


def _drive(store: Store, placement: Placement, display: Display, log_output: bool) -> Store:
    """Prepare, search and promote, on a cluster that is up.

    A sweep of which no trial completed is `failed`, and returned. Raises what made it impossible to go on, and
    KeyboardInterrupt when it was interrupted; the store says so either way, and `tuner resume` continues.
    """
    try:
        with _heartbeat(store), library_output_to(store.folder.log) if log_output else nullcontext():
            store.set_status("preparing")
            facts = prepare_on_ray(store.spec, placement, store.folder.log, display)
            store.set_prepared(facts["tokens_per_trial"], facts["data"], facts["baseline"])
            display.prepared(facts["data"], facts["baseline"], facts["tokens_per_trial"])
            store.set_status("running")
            _Trials(store, facts, display).search(placement)
            records = store.trials()
            winner = best_trial(records, store.spec.objective, facts["tokens_per_trial"])
            display.sweep_finished(records, winner[0] if winner else None)
            if winner is None:
                store.set_status("failed", "no trial completed its budget")
                return store
            if store.spec.promotion is not None:
                display.stage(f"Promoting trial {winner[0].number}")
                _promote(store, winner[0], display)
            store.set_status("finished")
    except KeyboardInterrupt:
        store.set_status("interrupted")
        raise
    except Exception as error:
        store.set_status("failed", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    return store


def _promote(store: Store, record: TrialRecord, display: Display) -> None:
    """Promote the winner if the gate agrees; a refusal is a result of the sweep, not its failure."""
    try:
        promote_trial(store, record, progress=display.stage)
    except PromotionRefused as refusal:
        store.set_promoted({"refused": refusal.reasons, "trial": record.number})
        display.stage(str(refusal))


class _Trials:
    """The trials of a running sweep: what Tune asks, reports and ends, turned into records and decisions."""

    def __init__(self, store: Store, facts: dict[str, Any], display: Display):
        self._store = store
        self._spec = store.spec
        self._facts = facts
        self._display = display
        self._search = Search(store.spec, store.study, facts["tokens_per_trial"])
        self._failures: dict[int, Ending] = {}
        self._halt = _Halt(store)

    def search(self, placement: Placement) -> None:
        """Run every remaining trial. Raises KeyboardInterrupt after a clean stop."""
        remaining = self._search.remaining
        if remaining <= 0:
            return
        self._display.stage(f"Searching: {remaining} trials, {placement.concurrent} at a time")
        job = {
            "spec": self._spec.model_dump(mode="json"),
            "preparation": self._facts,
            "workers": placement.workers,
            "resources": placement.resources,
            "threads": placement.threads,
        }
        # The coordinator of a trial only waits; its workers take the CPUs. Tune insists on some resource.
        coordinator = tune.PlacementGroupFactory([{"memory": 1}])
        with self._halt:
            tune.Tuner(
                tune.with_resources(tune.with_parameters(dedicated_trial, job=job), coordinator),
                tune_config=tune.TuneConfig(
                    search_alg=StudySearcher(self.ask, self.ended),
                    scheduler=StudyScheduler(self.take),
                    num_samples=remaining,
                    max_concurrent_trials=placement.concurrent,
                ),
                run_config=tune.RunConfig(
                    name=f"run-{time.time_ns()}",  # a name used before would silently resume that run
                    storage_path=str(self._store.folder.ray),
                    stop=self._halt,
                    verbose=0,
                ),
            ).fit()
        if self._halt.interrupted:
            raise KeyboardInterrupt

    def ask(self) -> TrialConfig | None:
        if self._halt.reason:
            return None
        config = self._search.ask()
        if config is not None:
            number = config["number"]
            shutil.rmtree(self._store.folder.trial(number), ignore_errors=True)  # what an earlier attempt left
            self._store.start_trial(number, config)
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
        return self._search.report(number, report)

    def ended(self, number: int) -> None:
        failure = self._failures.get(number)
        if self._halt.reason and failure is None:
            failure = Ending("STOPPED", "time limit", self._halt.reason)
            if self._halt.interrupted and not self._search.is_decided(number):
                return  # stays unfinished, for `tuner resume`
        ending = self._search.ending(number, failure)
        self._store.finish_trial(number, ending.outcome, ending.cause, ending.reason, ending.log_tail)
        self._search.tell(number, ending)
        keep_best_adapters(self._store)
        self._display.trial_finished(self._store.record(number))


class _Halt(NeverPickled, Stopper):
    """Ends the search between two results: on the first Ctrl-C, a cancellation, or when the time is up."""

    def __init__(self, store: Store):
        self._limit = store.spec.budget.time_limit
        self._deadline = time.monotonic() + self._limit - store.status().elapsed_s if self._limit else None
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
        self.reason = "interrupted"
        signal.signal(signal.SIGINT, self._previous)  # a second Ctrl-C does not wait

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = self.reason or f"budget.time_limit of {self._limit:g} s"
        return self.reason is not None


@contextmanager
def _heartbeat(store: Store) -> Iterator[None]:
    """Show readers, from a thread of its own, that this driver is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT_S):
            store.heartbeat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
