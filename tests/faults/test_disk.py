"""The disk is full: a trial fails or a promotion waits, the records stay, and when there is room again it goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tuner
from tests.faults.matrix import measure, recovery_s
from tests.made_by_hand import fill
from tests.real_sweeps import write_spec
from tuner.results.record import utc_now
from tuner.spec.layout import LEFT_TO_RECORDS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

BUDGET = {"trials": 3, "tokens_per_trial": 2_000, "evals_per_trial": 4}
MB = 10**6


def when(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def evaluations(name: str, root: Path) -> int:
    return len(tuner.open(name, root).store.reports()) if (root / "sweeps" / name).exists() else 0


def test_a_full_disk_fails_trials_and_not_the_store(tiny_model_dir, tmp_path, disk, start, note):
    """It fills when the first trial is through: the others fail, each at its first evaluation, and none is retried."""
    file, root = write_spec(tmp_path, tiny_model_dir, "full", budget=BUDGET, promotion=None), disk / "runs"
    running = start("run", file, "--root", root, cwd=tmp_path)
    when(lambda: evaluations("full", root) >= 4)
    fault, filler = utc_now(), fill(disk, LEFT_TO_RECORDS - MB)
    assert running.end() == 0, running.lines
    sweep = tuner.open("full", root)
    failed = [record for record in sweep.records() if record.outcome == "FAILED"]
    assert failed
    for record in failed:
        assert (record.cause, record.tried) == ("disk", ())
        assert "left to the records" in (record.reason or "")
        assert "left to the records" in (record.log_tail or "")
        assert not list(sweep.store.folder.trial(record.number).glob("*[!g]"))
    filler.unlink()
    ended = {record.number: ("FAILED", "disk") for record in failed}
    figures = measure(sweep, 1, [recovery_s(sweep, fault)], ended)
    note("disk full in a checkpoint", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)


def test_a_driver_without_room_for_its_records_says_how_to_go_on_and_goes_on(
    tiny_model_dir, tmp_path, disk, start, note
):
    """Somebody else takes the very last byte."""
    file, root = write_spec(tmp_path, tiny_model_dir, "none", budget=BUDGET, promotion=None), disk / "runs"
    running = start("run", file, "--root", root, cwd=tmp_path)
    when(lambda: evaluations("none", root) >= 2)
    filler = fill(disk, 0)
    assert running.end() == 1, running.lines
    assert f"`tuner resume none --root {root}` goes on" in running.lines[-1]
    filler.unlink()
    before, fault = tuner.open("none", root).records(), utc_now()
    resumed = start("resume", "none", "--root", root, cwd=tmp_path)
    assert resumed.end() == 0, resumed.lines
    sweep = tuner.open("none", root)
    figures = measure(sweep, 1, [recovery_s(sweep, fault)], before=[before])
    note("disk full in a checkpoint", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)


def test_a_promotion_without_room_leaves_nothing_and_is_made_up_for(tiny_model_dir, tmp_path, disk, start, note):
    """There is room for adapters and records, but not for the merged model."""
    promotion = {"max_regression": 10.0}
    file, root = write_spec(tmp_path, tiny_model_dir, "merge", budget=BUDGET, promotion=promotion), disk / "runs"
    filler = fill(disk, LEFT_TO_RECORDS + 10 * MB)
    running = start("run", file, "--root", root, cwd=tmp_path)
    assert running.end() == 1, running.lines
    assert f"`tuner resume merge --root {root}` goes on" in running.lines[-1]
    sweep = tuner.open("merge", root)
    assert sweep.status == "failed"
    assert [path.name for path in (root / "models/production").iterdir()] in ([".lock"], [])
    before = sweep.records()
    promoted = start("promote", "merge", "--root", root, cwd=tmp_path)
    assert promoted.end() == 1
    assert "the disk of" in promoted.lines[-1]
    filler.unlink()
    fault = utc_now()
    resumed = start("resume", "merge", "--root", root, cwd=tmp_path)
    assert resumed.end() == 0, resumed.lines
    assert os.readlink(root / "models/production/current") == "v1"
    figures = measure(sweep := tuner.open("merge", root), 1, [recovery_s(sweep, fault)], before=[before])
    note("disk full in promotion", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
