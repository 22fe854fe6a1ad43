"""One real sweep through Ray, with a trial for every outcome, and what can be asked of it afterwards."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from optuna.trial import TrialState
from real_sweeps import write_rows, writes

import tuner
from tuner.execution.events import Silent
from tuner.promotion import registry
from tuner.results.record import TrialRecord
from tuner.spec.layout import Root
from tuner.spec.load import parse_spec
from tuner.spec.sweep import SweepSpec

pytestmark = pytest.mark.timeout(900)

GOOD, BAD, DIVERGING = 0.005, 1e-6, 1e30


def spec_for(tiny_model_dir: Path, folder: Path) -> SweepSpec:
    """Eight rows to train on, so that a trial that learns overfits: its best evaluation is in the middle."""
    rng = random.Random(0)
    write_rows(folder / "train.jsonl", 0, 8, rng)
    write_rows(folder / "eval.jsonl", 100, 16, rng)
    plain = {"train.optim": "adamw_torch", "train.packing": "none"}
    return parse_spec(
        {
            "name": "every-outcome",
            "model": {"name": str(tiny_model_dir), "dtype": "float32"},
            "data": {"path": "train.jsonl", "eval_path": "eval.jsonl"},
            "train": {
                "max_length": 64,
                "per_device_train_batch_size": 4,
                "gradient_checkpointing": False,
                "lr_scheduler_type": "constant",
                "optim_target_modules": "all-linear",
                "optim_args": "rank=four",
            },
            "lora": {"r": 16},
            "space": {
                "train.learning_rate": {"type": "choice", "values": [GOOD, BAD, DIVERGING]},
                # the second reads its rank as a number, which only the trainer finds out
                "train.optim": {"type": "choice", "values": ["adamw_torch", "galore_adamw"]},
                "train.packing": {"type": "choice", "values": ["none", "bfd"]},
            },
            "budget": {"trials": 5, "tokens_per_trial": 6000, "evals_per_trial": 6},
            "search": {
                "sampler": "random",
                "enqueue": [
                    {"train.learning_rate": GOOD, **plain},
                    {"train.learning_rate": BAD, **plain},
                    {"train.learning_rate": DIVERGING, **plain},
                    {"train.learning_rate": GOOD, **plain, "train.optim": "galore_adamw"},
                    {"train.learning_rate": GOOD, **plain, "train.packing": "bfd"},
                ],
            },
            "stopping": {"type": "asha", "grace_evals": 1, "reduction_factor": 2},
            "resources": {"max_concurrent_trials": 1, "share_base": "off"},
            "storage": {"root": str(folder / "runs"), "keep_best": 1},
        },
        folder,
    )


class Watcher(Silent):
    """Notes which processes still write to a trial's log when it has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.left: dict[int, list[psutil.Process]] = {}
        self.left_here: set[Path] = set()
        self.events: list[str] = []

    def trial_started(self, number: int, point: dict[str, Any]) -> None:
        self.events.append(f"start {number}")

    def trial_finished(self, record: TrialRecord) -> None:
        self.events.append(f"{record.outcome} {record.number}")
        log = self._folder / "runs" / "sweeps" / "every-outcome" / "trials" / f"{record.number:05d}" / "trial.log"
        assert log.exists()
        self.left[record.number] = [process for process in psutil.process_iter() if writes(process, log)]


@pytest.fixture(scope="module")
def finished(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuner.Sweep, Watcher]:
    import ray

    folder = tmp_path_factory.mktemp("sweep")
    watcher = Watcher(folder)
    before = left_on_this_machine()
    sweep = tuner.run(spec_for(tiny_model_dir, folder), display=watcher)
    assert not ray.is_initialized()
    watcher.left_here = left_on_this_machine() - before
    return sweep, watcher


def left_on_this_machine() -> set[Path]:
    """Semaphores of processes, and folders of Ray's sessions."""
    sessions = Path(tempfile.gettempdir(), "ray").glob("session_2*")
    return {*Path("/dev/shm").glob("sem.mp-*"), *sessions}


def test_every_trial_ends_with_the_outcome_it_deserves(finished):
    sweep, watcher = finished
    assert sweep.status == "finished"
    assert [(record.outcome, record.cause) for record in sweep.records()[:4]] == [
        ("COMPLETED", None),
        ("STOPPED", "early stopping"),
        ("INFEASIBLE", "diverged"),
        ("FAILED", "bug"),
    ]
    assert sweep.trial(4).outcome in ("COMPLETED", "STOPPED")  # a real contest
    assert watcher.events[:2] == ["start 0", "COMPLETED 0"]


def test_a_failed_trial_keeps_its_reason_and_its_log(finished):
    failed = finished[0].trial(3)
    assert failed.reason is not None
    assert "'four'" in failed.reason
    assert failed.log_tail is not None
    assert "Traceback" in failed.log_tail


def test_optuna_has_recorded_the_same(finished):
    trials = finished[0].store.study.trials
    states = [trial.state for trial in trials[:4]]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED, TrialState.FAIL]
    assert list(trials[0].intermediate_values) == [1000, 2000, 3000, 4000, 5000, 6000]
    assert list(trials[1].intermediate_values) == [1000]
    assert [sum(trial.constraints.values()) for trial in trials[:4]] == [0, 0, 1, 0]


def test_the_process_of_every_trial_is_gone_when_the_trial_is_over(finished):
    _, watcher = finished
    assert watcher.left == {number: [] for number in range(5)}


def test_a_sweep_leaves_no_semaphore_and_no_session_of_ray(finished):
    _, watcher = finished
    assert watcher.left_here == set()


def test_the_best_evaluation_wins_not_the_last(finished):
    sweep, _ = finished
    losses = [report.eval_loss for report in sweep.trial(0).reports]
    bottom = losses.index(min(losses))
    assert 0 < bottom < 5, "the curve must be U-shaped for this test to mean anything"
    assert sweep.best is not None
    assert sweep.best.eval_loss == min(sweep.best.reports, key=lambda report: report.eval_loss).eval_loss
    assert sweep.best.report.tokens == sweep.best.tokens < 6000
    assert sweep.state().promoted["trial"] == sweep.best.number
    assert sweep.state().promoted["score_before"] == sweep.best.eval_loss
    assert sweep.state().promoted["score_after"] == pytest.approx(sweep.best.eval_loss, abs=1e-4)


def test_only_the_best_adapter_is_left_and_no_record_names_one_that_is_gone(finished):
    sweep, _ = finished
    left = {str(path.parent) for path in sweep.folder.path.glob("trials/*/*/adapter_model.safetensors")}
    assert left == {sweep.best.adapter_path}
    assert set(sweep.reports()["adapter_path"].dropna()) == left


def test_the_results_are_there_for_a_script(finished):
    document = finished[0].results()
    assert document["baseline"]["eval_loss"] == pytest.approx(10.8, abs=0.3)
    best = next(trial for trial in document["trials"] if trial["number"] == document["best"])
    assert best["eval_loss"] < document["baseline"]["eval_loss"]
    assert len(finished[0].reports()) >= 6 + 1 + 1 + 1


def test_a_model_can_be_promoted_again_and_rolled_back(finished):
    sweep, _ = finished
    root = Root.of(sweep.spec)
    first = registry.current(root, "production")
    assert (first.name, first.path) == ("v1", Path(sweep.state().promoted["path"]))
    with pytest.raises(tuner.PromotionRefused, match="not better than"):
        sweep.promote()
    assert registry.current(root, "production").name == "v1"
    again = sweep.promote(force=True)
    assert (again.version, again.forced) == ("v2", True)
    registry.rollback(root, "production")
    assert registry.current(root, "production").name == "v1"


def test_a_name_that_is_taken_is_refused_before_ray_starts(finished):
    started = time.monotonic()
    with pytest.raises(tuner.TunerError, match="exists already"):
        tuner.run(finished[0].spec)
    assert time.monotonic() - started < 3


class GroupWatcher(Silent):
    """Notes how long the placement groups of Ray Train stay that are there when a trial ends."""

    def __init__(self) -> None:
        self.gone_after: list[float] = []
        self._threads: list[threading.Thread] = []

    def trial_finished(self, record: TrialRecord) -> None:
        groups = self.living_groups()
        assert groups, "a trial of two workers that has just ended must have had a placement group"
        self._threads.append(threading.Thread(target=self.wait_until_gone, args=(groups, time.monotonic())))
        self._threads[-1].start()

    def sweep_finished(self, records: Any, best: Any) -> None:
        for thread in self._threads:
            thread.join()

    def living_groups(self) -> set[str]:
        import ray

        return {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}

    def wait_until_gone(self, groups: set[str], since: float) -> None:
        while groups & self.living_groups() and time.monotonic() < since + 60:
            time.sleep(0.25)
        self.gone_after.append(time.monotonic() - since)


def test_the_workers_of_a_trial_of_two_are_freed_when_it_is_through_and_when_it_is_stopped(tiny_model_dir, tmp_path):
    asked = spec_for(tiny_model_dir, tmp_path).model_dump(mode="json")
    asked["resources"] |= {"workers_per_trial": 2}
    asked["budget"] |= {"trials": 2, "evals_per_trial": 2, "tokens_per_trial": 2000}
    asked["search"]["enqueue"] = asked["search"]["enqueue"][:2]
    watcher = GroupWatcher()
    sweep = tuner.run(parse_spec(asked | {"promotion": None}, tmp_path), display=watcher)
    assert [record.outcome for record in sweep.records()] == ["COMPLETED", "STOPPED"]
    assert len(watcher.gone_after) == 2
    assert max(watcher.gone_after) < 15
