"""The driver is killed, whenever: what was finished stays, what was cut off goes on, nothing is left running."""

from __future__ import annotations

import random
import subprocess
import time

import psutil
import pytest

import tuner
from tests.faults.matrix import difference_alone, measure, recovery_s
from tests.real_sweeps import Command, write_spec
from tuner.results.record import TrialRecord, utc_now

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

KILLS = 10
LONGEST_S = 20.0
"""Most seconds that a driver lives: it starts Ray, prepares, has some trials report; sometimes it is done."""
REPORTING_S = 5.0
"""Most seconds that every second one lives after a trial has reported, however long that takes on this machine."""


@pytest.mark.parametrize(("share", "seed"), [(2, 1), ("off", 2)])
def test_a_driver_killed_at_random_moments_loses_nothing(tiny_model_dir, tmp_path, start, note, share, seed):
    """Whenever the sweep is finished before it was killed often enough, two more trials are asked for."""
    rng, name, root = random.Random(seed), "killed", tmp_path / "runs"
    budget = {"trials": 4, "tokens_per_trial": 12_000, "evals_per_trial": 4}
    file = write_spec(tmp_path, tiny_model_dir, name, budget=budget, resources={"share_base": share})
    moments: list[list[TrialRecord]] = []
    recover_s: list[float | None] = []
    cut_off: set[int] = set()
    agents: list[psutil.Process] = []
    command, kills, fault = ["run", file], 0, None
    while True:
        running = start(*command, "--root", root, cwd=tmp_path)
        longest_s = LONGEST_S
        if kills % 2 and kills < KILLS:
            longest_s = REPORTING_S
            wait_for_a_report(running)
        try:
            code = running.process.wait(rng.uniform(0, longest_s) if kills < KILLS else 240)
        except subprocess.TimeoutExpired:
            code, killed, kills = None, utc_now(), kills + 1
            agents += running.kill_driver()
        assert not code, running.lines
        if not (root / "sweeps" / name).exists():
            print(f"kill {kills}: there is no sweep yet")
            continue
        sweep = tuner.open(name, root)
        if fault:
            recover_s.append(recovery_s(sweep, fault))
        fault = killed if code is None else None
        moments.append(sweep.records())
        running_then = {record.number for record in moments[-1] if record.outcome == "RUNNING" and record.reports}
        cut_off |= running_then
        print(f"kill {kills}, {code}: {sweep.status}, {len(moments[-1])} trials, {running_then} cut off")
        if code == 0 and kills == KILLS:
            break
        more = ["--set", f"budget.trials={sweep.spec.budget.trials + 2}"] if code == 0 else []
        command = ["resume", name, *more]
    assert sweep.status == "finished"
    assert cut_off
    assert not psutil.wait_procs(agents, timeout=90)[1]
    difference = difference_alone(sweep, sorted(cut_off), tmp_path)
    figures = measure(sweep, kills, recover_s, before=moments, difference=difference)
    note("the driver killed at 20 random moments", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert difference <= 1e-5


def wait_for_a_report(running: Command) -> None:
    """Until a trial has reported, or the driver is done."""
    end = time.monotonic() + 120
    while running.process.poll() is None and not any(" tokens: " in line for line in running.lines):
        assert time.monotonic() < end, running.lines
        time.sleep(0.1)
