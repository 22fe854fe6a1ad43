"""Nodes of a cluster go away: one of those that train, or the head, without which there is no cluster."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
import pytest

import tuner
from tests.faults.deaths import went_on_s
from tests.faults.matrix import difference_alone, measure, recovery_s
from tests.raylets import Raylets, raylets
from tests.real_sweeps import Command, write_spec
from tuner.results.record import TrialRecord, utc_now

pytestmark = [pytest.mark.faults, pytest.mark.timeout(420)]

GCS = "gcs_server"
RESOURCES = {"alone": {"share_base": "off"}, "engine": {"share_base": 1}, "workers": {"workers_per_trial": 2}}
LONG = {"alone": 64, "engine": 192}
"""Epochs of a trial that lasts longer than it takes to notice that the head is gone."""


@pytest.fixture
def cluster() -> Iterator[Raylets]:
    """Two nodes of one CPU each."""
    with raylets(1, 1) as cluster:
        yield cluster


@pytest.mark.parametrize("name", ["alone", "engine"])
def test_the_trials_of_a_node_that_is_lost_are_tried_again_on_another(
    cluster, tiny_model_dir, tmp_path, start, note, name
):
    write(tmp_path, tiny_model_dir, name, trials=4, at_once=2)
    running = start("run", f"{name}.yaml", "--root", "runs", cwd=tmp_path, **cluster.environment)
    running.wait_for("trial 0 at ")
    running.wait_for("trial 1 at ")
    fault = utc_now()
    cluster.remove(next(node for node in cluster.nodes if trains(node)))
    assert running.end() == 0, running.lines
    sweep = tuner.open(name, tmp_path / "runs")
    again = [record for record in sweep.records() if record.tried]
    assert again
    assert {attempt.cause for record in again for attempt in record.tried} <= {"preempted", "worker-lost"}
    difference = difference_alone(sweep, [record.number for record in again], tmp_path)
    took = min(went_on_s(sweep, record.number, fault) for record in again)
    figures = note("a raylet removed", measure(sweep, 1, [took], difference=difference))
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert difference <= 1e-5


def test_a_sweep_without_a_head_ends_with_a_word_and_goes_on_when_there_is_one_again(
    tiny_model_dir, tmp_path, start, note
):
    """Two sweeps on one cluster, with a node for each. The nodes end a minute after their head; here, as soon as it."""
    folders = {name: tmp_path / name for name in ("engine", "alone")}
    drivers = {}
    with raylets(2, 2) as cluster:
        for name, folder in folders.items():
            folder.mkdir()
            write(folder, tiny_model_dir, name, trials=2, at_once=2, epochs=LONG[name])
            drivers[name] = start("run", f"{name}.yaml", "--root", "runs", cwd=folder, **cluster.environment)
        for driver in drivers.values():
            driver.wait_for("trial 0 at ")
        fault = utc_now()
        head, *others = cluster.nodes
        cluster.remove(head)
        before = {name: head_is_lost(driver, name, folders[name]) for name, driver in drivers.items()}
        for node in others:
            cluster.remove(node)
        cluster.start_head()
        cluster.add(2)
        cluster.add(2)
        restarted = utc_now()
        for name, folder in folders.items():
            drivers[name] = start("resume", name, "--root", "runs", cwd=folder, **cluster.environment)
        for name, folder in folders.items():
            assert drivers[name].end() == 0, drivers[name].lines
            sweep = tuner.open(name, folder / "runs")
            took = went_on_after(sweep, fault, restarted)
            cut_off = [record.number for record in before[name] if record.reports and not record.finished]
            difference = difference_alone(sweep, cut_off[:1], folder)  # a minute each
            figures = measure(sweep, 1, [took], before=[before[name]], difference=difference)
            note("the head killed and restarted", figures)
            assert (figures.lost, figures.duplicated) == (0, 0)
            assert difference <= 1e-5


def test_when_the_head_s_own_records_are_lost_the_sweep_ends_and_goes_on_with_another(
    tiny_model_dir, tmp_path, start, note
):
    """Of a cluster that the sweep has started itself, for trials of two workers each.

    They train on while nobody hears them; what they found out is recorded when they go on from there.
    """
    name = "workers"
    write(tmp_path, tiny_model_dir, name, trials=2, at_once=1)
    running = start("run", f"{name}.yaml", "--root", "runs", cwd=tmp_path)
    running.wait_for("trial 0 at ")
    (store,) = [one for one in psutil.Process(running.process.pid).children(recursive=True) if one.name() == GCS]
    fault = utc_now()
    store.kill()
    before = head_is_lost(running, name, tmp_path)
    restarted = utc_now()
    resumed = start("resume", name, "--root", "runs", cwd=tmp_path)
    assert resumed.end() == 0, resumed.lines
    sweep = tuner.open(name, tmp_path / "runs")
    figures = measure(sweep, 1, [went_on_after(sweep, fault, restarted)], before=[before])
    note("the head killed and restarted", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)


def write(folder: Path, model: Path, name: str, trials: int, at_once: int, epochs: int = 8) -> None:
    resources = {"max_concurrent_trials": at_once, **RESOURCES[name]}
    budget = {"trials": trials, "epochs_per_trial": epochs, "evals_per_trial": 8}
    # At a high rate, roundings would grow over so many steps to more than what is looked for.
    space = {"train.learning_rate": {"type": "log_uniform", "low": 1e-5, "high": 5e-5}}
    write_spec(folder, model, name, budget=budget, resources=resources, space=space, promotion=None)


def went_on_after(sweep: tuner.Sweep, fault: datetime, restarted: datetime) -> float:
    """Seconds from a fault to the first progress of the driver that was started later."""
    return (restarted - fault).total_seconds() + (recovery_s(sweep, restarted) or 0.0)


def trains(node: subprocess.Popen) -> bool:
    """Whether trials train on a node: Ray names a process after the call that it answers."""
    titles = [" ".join(process.cmdline()) for process in psutil.Process(node.pid).children(recursive=True)]
    return any(title.startswith("ray::") and ".advance" in title for title in titles)


def head_is_lost(driver: Command, name: str, folder: Path) -> list[TrialRecord]:
    """The driver has ended, and said why, and what to type when there is a cluster again. Returns what it left."""
    assert driver.end(90) == 3, driver.lines
    last, sweep = driver.lines[-1], tuner.open(name, folder / "runs")
    assert "the head of the Ray cluster at " in last
    assert f"`tuner resume {name} --root {folder / 'runs'}` goes on" in last
    assert sweep.status == "failed"
    assert last.endswith(sweep.state().message or "-")
    assert not any("Traceback" in line for line in driver.lines)
    return sweep.records()
