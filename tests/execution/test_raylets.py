"""Sweeps on a cluster of several nodes: each node a raylet of its own, where possible in a network namespace."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from raylets import Raylets, kill_with_family, raylets
from real_sweeps import Command, write_spec

import tuner

pytestmark = pytest.mark.timeout(280)


def start(cluster: Raylets, folder: Path, name: str) -> Command:
    return Command("run", f"{name}.yaml", "--root", "runs", cwd=folder, **cluster.environment)


def finished(command: Command, folder: Path, name: str, timeout_s: float = 240) -> tuner.Sweep:
    try:
        assert command.process.wait(timeout_s) == 0, command.lines
    finally:
        command.kill()
    return tuner.open(name, folder / "runs")


def write(folder: Path, model: Path, name: str, trials: int, **sections: Any) -> None:
    """Trials of two workers of one CPU each, eight steps and two evaluations long."""
    values: dict[str, Any] = {
        "budget": {"trials": trials, "epochs_per_trial": 1, "evals_per_trial": 2},
        "resources": {"workers_per_trial": 2},
        "promotion": None,
    }
    write_spec(folder, model, name, **values | sections)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Raylets]:
    """Two nodes of one CPU each: a trial of two workers needs both."""
    with raylets(1, 1) as cluster:
        yield cluster


def worked(sweep: tuner.Sweep) -> list[tuple[float, float]]:
    """When each trial's workers began to train, and when it was over."""
    begun: dict[int, float] = {}
    for report in sweep.store.reports():
        begun.setdefault(report["trial"], report["time"].timestamp() - report["duration_s"])
    return [(begun[trial.number], trial.finished.timestamp()) for trial in sweep.records()]


def overlaps(spans: list[tuple[float, float]]) -> int:
    """How many of them began before another was over."""
    return sum(one[0] < other[1] and other[0] < one[1] for one, other in combinations(spans, 2))


WATCH = """
import time, ray
from ray.util import placement_group_table
ray.init(log_to_driver=False, logging_level="error")
known = {}
while True:
    for name, group in placement_group_table().items():
        if len(group["bundles"]) == 2 and known.get(name) != group["state"]:
            known[name] = group["state"]
            print(time.time(), group["state"], flush=True)
    time.sleep(0.5)
"""


@contextmanager
def groups_watched(cluster: Raylets) -> Iterator[Callable[[str], list[float]]]:
    """When groups of two workers were CREATED or REMOVED, as a driver of its own sees it."""
    command, environment = [sys.executable, "-c", WATCH], {**os.environ, **cluster.environment}
    with tempfile.TemporaryFile("w+") as said:
        watcher = subprocess.Popen(command, stdout=said, env=environment)

        def when(state: str) -> list[float]:
            said.seek(0)
            return [float(line.split()[0]) for line in said if state in line]

        try:
            yield when
        finally:
            kill_with_family(watcher)


def test_a_sweep_waits_for_nodes_says_so_and_spreads_its_trials_over_those_that_join(tiny_model_dir, tmp_path):
    write(tmp_path, tiny_model_dir, "joined", trials=1)
    with raylets() as cluster:
        command = start(cluster, tmp_path, "joined")
        command.wait_for("no room: one trial needs 2 x (1 CPU), the cluster has 0 CPU", 60)
        message = tuner.open("joined", tmp_path / "runs").state().message
        before = cluster.traffic()
        cluster.add(1)
        cluster.add(1)
        sweep = finished(command, tmp_path, "joined")
        crossed = cluster.traffic() - before
    (trial,) = sweep.records()
    assert trial.outcome == "COMPLETED", trial
    assert [report.step for report in trial.reports] == [4, 8]  # 32 rows, 2 of the 4 of a step for each worker
    assert message.startswith("no room: one trial needs 2 x (1 CPU)")
    assert sweep.state().message is None
    assert crossed > 2**20 or cluster.network is None


@pytest.mark.cluster
def test_a_search_of_sharded_trials_gives_back_the_workers_of_those_it_stops_and_uses_a_node_that_joins(
    nodes, tiny_model_dir, tmp_path
):
    stopping = {"type": "asha", "grace_evals": 1, "reduction_factor": 2}
    resources = {"workers_per_trial": 2, "strategy": "zero2"}
    write(tmp_path, tiny_model_dir, "halving", trials=5, stopping=stopping, resources=resources)
    with groups_watched(nodes) as when:
        command = start(nodes, tmp_path, "halving")
        command.wait_for("trial 1 starts")
        node = nodes.add(2)
        try:
            sweep = finished(command, tmp_path, "halving")
        finally:
            nodes.remove(node)
        created, removed = when("CREATED"), when("REMOVED")
    trials = sweep.records()
    assert {trial.outcome for trial in trials} == {"COMPLETED", "STOPPED"}, trials
    at_once = [sum(one <= moment for one in created) - sum(one < moment for one in removed) for moment in created]
    assert max(at_once) == 2, (created, removed)  # only the node that joined makes room for another
    for trial in trials:
        over = trial.finished.timestamp()
        assert any(over - 5 < moment < over + 15 for moment in removed), (trial, removed)


@pytest.mark.cluster
def test_every_node_has_an_engine_and_trials_spread_over_them(nodes, tiny_model_dir, tmp_path):
    write(tmp_path, tiny_model_dir, "engines", trials=4, resources={"share_base": 1}, search={"sampler": "random"})
    sweep = finished(start(nodes, tmp_path, "engines"), tmp_path, "engines")
    assert all(trial.outcome == "COMPLETED" for trial in sweep.records())
    assert (sweep.state().sharing or {})["engines"] == 2
    assert overlaps(worked(sweep)) > 0  # of one slot each


@pytest.mark.cluster
def test_two_sweeps_take_turns(nodes, tiny_model_dir, tmp_path):
    for name in ("one", "other"):
        write(tmp_path, tiny_model_dir, name, trials=3)
    commands = {name: start(nodes, tmp_path, name) for name in ("one", "other")}
    sweeps = {name: finished(command, tmp_path, name) for name, command in commands.items()}
    assert all(trial.outcome == "COMPLETED" for sweep in sweeps.values() for trial in sweep.records())
    spans = {name: worked(sweep) for name, sweep in sweeps.items()}
    assert overlaps([*spans["one"], *spans["other"]]) == 0  # none holds one node and waits for the other
    turns = [name for _, name in sorted((begin, name) for name, each in spans.items() for begin, _ in each)]
    assert len(set(turns[:3])) == 2, turns  # neither waits until the other is done
