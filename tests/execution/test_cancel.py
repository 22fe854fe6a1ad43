"""Trials cancelled, a point added and a budget extended while real sweeps run; of a cancelled trial nothing is left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import tuner
from tests.real_sweeps import write_spec, writes
from tuner.errors import NotFoundError

pytestmark = pytest.mark.timeout(240)

PATIENCE_S = 90
ADDED = {"train.learning_rate": 0.0025}


def until(there: Callable[[], Any]) -> Any:
    """What there is, once there is something."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            if found := there():
                return found
        except NotFoundError:  # not yet
            pass
        time.sleep(0.1)
    raise AssertionError(f"{there} found nothing in {PATIENCE_S} s")


def writers(sweep: tuner.Sweep, number: int) -> set[psutil.Process]:
    """The processes that write a trial's log."""
    return {process for process in psutil.process_iter() if writes(process, sweep.folder.trial_log(number))}


def run(file: Path, ask: Callable[[tuner.Sweep], None]) -> tuner.Sweep:
    """Run a sweep to its end in this process; meanwhile somebody asks for something, in a thread."""
    spec = tuner.load_spec(file)
    came: list[BaseException] = []

    def person() -> None:
        try:
            ask(until(lambda: tuner.open(spec.name, spec.storage.root)))
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=person)
    thread.start()
    sweep = tuner.run(spec)
    thread.join()
    for error in came:
        raise error
    return sweep


@pytest.fixture
def file(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """Of a sweep of two long trials at once, without a promotion."""

    def write(name: str, **sections: Any) -> Path:
        kept = {"storage": {"root": str(tmp_path / "runs")}, "promotion": None}
        return write_spec(tmp_path, tiny_model_dir, name, **kept | sections)

    return write


@pytest.mark.faults
def test_a_trial_in_a_process_of_its_own_is_cancelled_and_the_sweep_takes_a_point_and_more_trials(file):
    said: dict[str, Any] = {}

    def ask(sweep: tuner.Sweep) -> None:
        until(lambda: sweep.trial(0).reports and sweep.trial(1).reports)
        said["reports"] = len(sweep.trial(0).reports)
        said["processes"] = until(lambda: writers(sweep, 0))
        sweep.cancel(0)
        said["left"] = [process for process in said["processes"] if process.is_running()]
        sweep.extend("budget.trials=3")  # none was left to begin, so its place is given up by now
        said["added"] = sweep.add(ADDED)

    budget = {"trials": 2, "tokens_per_trial": 6000, "evals_per_trial": 12}
    sweep = run(file("own", budget=budget, resources={"max_concurrent_trials": 2, "share_base": "off"}), ask)
    first, *others = sweep.records()
    assert (first.outcome, first.cause) == ("STOPPED", "cancelled")
    assert said["reports"] <= len(first.reports) < 12
    assert (len(said["processes"]), said["left"]) == (1, [])
    assert [(record.number, record.outcome) for record in others] == [(k, "COMPLETED") for k in (1, 2)]
    assert sweep.trial(said["added"]).point == ADDED
    assert (sweep.status, sweep.spec.budget.trials) == ("finished", 3)


def test_slots_are_cancelled_and_others_take_their_places_on_the_same_base(file):
    """The second trial is no slot: with DoRA it trains apart, in a process of the engine's."""
    said: dict[str, Any] = {}

    def ask(sweep: tuner.Sweep) -> None:
        until(lambda: sweep.trial(0).reports)
        sweep.cancel(0)
        said["apart"] = until(lambda: writers(sweep, 1))
        sweep.cancel(1)
        said["left"] = [process for process in said["apart"] if process.is_running()]

    points = [{"lora.use_dora": dora} for dora in (False, True, False)]
    sweep = run(
        file(
            "shared",
            space={
                "train.learning_rate": {"type": "log_uniform", "low": 1e-3, "high": 5e-3},
                "lora.use_dora": {"type": "choice", "values": [False, True]},
            },
            search={"sampler": "random", "enqueue": points},
            budget={"trials": 3, "tokens_per_trial": 6000, "evals_per_trial": 12},
            resources={"share_base": 2},
        ),
        ask,
    )
    records = sweep.records()
    assert [record.cause for record in records] == ["cancelled", "cancelled", None]
    assert records[2].outcome == "COMPLETED"
    assert 0 < len(records[0].reports) < 12
    assert (len(said["apart"]), said["left"]) == (1, [])
    assert sweep.status == "finished"


def living_groups() -> set[str]:
    """The placement groups of the cluster that this process drives."""
    import ray

    return {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.mark.faults
def test_a_trial_of_two_workers_is_cancelled_and_its_group_and_processes_go_while_the_sweep_goes_on(file):
    """Ray Train frees a group some seconds after the trial's coordinator is gone."""
    said: dict[str, Any] = {}

    def ask(sweep: tuner.Sweep) -> None:
        until(lambda: sweep.trial(0).reports)
        groups, workers = living_groups(), writers(sweep, 0)
        sweep.cancel(0)
        said["workers"], began = len(workers), time.monotonic()
        until(lambda: not groups & living_groups() and not any(worker.is_running() for worker in workers))
        said["seconds"], said["then"] = time.monotonic() - began, sweep.status
        sweep.extend("budget.trials=3")
        said["added"] = sweep.add(ADDED)

    resources = {"workers_per_trial": 2, "max_concurrent_trials": 1, "share_base": "off"}
    budget = {"trials": 2, "tokens_per_trial": 6000, "evals_per_trial": 12}
    sweep = run(file("workers", budget=budget, resources=resources), ask)
    first, *others = sweep.records()
    assert (first.outcome, first.cause) == ("STOPPED", "cancelled")
    assert 0 < len(first.reports) < 12
    assert (said["workers"], said["then"]) == (2, "running")
    assert said["seconds"] < 30
    assert [(record.number, record.outcome) for record in others] == [(k, "COMPLETED") for k in (1, 2)]
    assert sweep.trial(said["added"]).point == ADDED
