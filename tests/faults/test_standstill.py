"""A train loop that sleeps for ever, and a worker that gives up while another waits for it, in whole sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

import tuner
from tests.faults.matrix import difference_alone, measure, recovery_s
from tests.real_sweeps import write_spec, writes
from tests.sleeper import Sleeper
from tuner.execution.events import Silent
from tuner.results.record import utc_now
from tuner.spec.load import load_spec
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

WAYS: dict[str, dict[str, Any]] = {
    "alone": {"share_base": "off", "max_concurrent_trials": 1},
    "lane": {"share_base": 2},
    "workers": {"workers_per_trial": 2, "max_concurrent_trials": 1},
}


@pytest.fixture
def sleeper(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sleeper:
    from transformers import dynamic_module_utils

    modules = str(tmp_path / "modules")
    monkeypatch.setenv("HF_MODULES_CACHE", modules)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    return Sleeper(tiny_model_dir, tmp_path)


class AfterFirstReport(Silent):
    """Does something to the first trial, once, and notes when."""

    def __init__(self, does: Any):
        self._does = does
        self.done: Any = None

    def trial_reported(self, number: int, report: Report) -> None:
        if number == 0 and self.done is None:
            self.done = utc_now()
            self._does()


def spec_for(sleeper: Sleeper, folder: Path, resources: dict[str, Any]) -> SweepSpec:
    file = write_spec(
        folder,
        sleeper.path,
        "sleepy",
        budget={"trials": 2, "tokens_per_trial": 6_000, "evals_per_trial": 3},
        resources={**resources, "stuck_after": "6s"},
        promotion=None,
    )
    return load_spec(file, ["model.trust_remote_code=true"], root=folder / "runs")


@pytest.mark.parametrize("way", WAYS)
def test_a_trial_that_sleeps_for_ever_is_tried_again_and_keeps_the_stacks(sleeper, tmp_path, note, way):
    display = AfterFirstReport(lambda: sleeper.sleep(rank=WAYS[way].get("workers_per_trial", 1) - 1))
    sweep = tuner.run(spec_for(sleeper, tmp_path, WAYS[way]), display=display)
    asleep = [record for record in sweep.records() if record.tried]
    assert 0 in [record.number for record in asleep]
    for record in asleep:
        (attempt,) = record.tried
        assert (attempt.cause, attempt.tokens >= 2_000) == ("stuck", record.number == 0 or attempt.tokens > 0)
        assert attempt.reason.startswith("no step for ")
        assert "in fall_asleep" in attempt.log_tail
    figures = measure(
        sweep,
        injected=1,
        recover_s=[recovery_s(sweep, display.done)],
        difference=difference_alone(sweep, [record.number for record in asleep], tmp_path),
    )
    note("a train loop that sleeps for ever", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
    assert figures.difference <= 1e-5


def test_a_worker_that_fails_while_the_other_waits_for_it_is_the_reason_in_seconds(sleeper, tmp_path, note):
    display = AfterFirstReport(lambda: sleeper.fail(rank=0))
    sweep = tuner.run(spec_for(sleeper, tmp_path, WAYS["workers"]), display=display)
    failed = sweep.trial(0)
    assert failed.reason == "RuntimeError: rank 0 has had enough"
    assert "in fall_asleep" in failed.log_tail
    assert (failed.finished - display.done).total_seconds() < 20
    assert not [one for one in psutil.process_iter() if writes(one, sweep.folder.trial_log(0))]
    figures = measure(sweep, injected=1, recover_s=[recovery_s(sweep, display.done)], ended={0: ("FAILED", "bug")})
    note("rank 0 raising while rank 1 waits in a collective", figures)
    assert (figures.lost, figures.duplicated) == (0, 0)
