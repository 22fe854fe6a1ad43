"""A real sweep on a space with an impossible corner: what is never tried, what runs out of memory, and how many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.real_sweeps import write_spec

pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("shared_ray")]
ROWS = "train.per_device_train_batch_size"
LIMIT = 600_000_000
"""Bytes of a worker. By estimate 16 rows of 21 tokens take 375 MB, but every row is padded to 64."""
POINTS = [{ROWS: rows, "train.learning_rate": rate} for rows, rate in ((256, 2e-3), (32, 2e-3), (32, 3e-3))]


@pytest.fixture(scope="module")
def resumed(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], tuner.Sweep]:
    """Three trials, and then one more; with the records of the three."""
    folder = tmp_path_factory.mktemp("corner")
    file = write_spec(
        folder,
        tiny_model_dir,
        "corner",
        train={"max_length": 64, "pad_to_multiple_of": 64, "gradient_checkpointing": False},
        space={
            ROWS: {"type": "choice", "values": [2, 32, 256]},
            "train.learning_rate": {"type": "log_uniform", "low": 1e-3, "high": 5e-3},
        },
        search={"sampler": "random", "seed": 2, "enqueue": POINTS},
        budget={"trials": 3, "tokens_per_trial": 200, "evals_per_trial": 1},
        resources={"max_concurrent_trials": 1, "memory_per_worker": LIMIT},
        promotion=None,
    )
    before = tuner.run(file, root=folder / "runs").records()
    return before, tuner.resume("corner", "budget.trials=4", root=folder / "runs")


def test_a_point_that_no_worker_has_the_memory_for_is_not_tried(resumed):
    before, sweep = resumed
    first = before[0]
    assert (first.outcome, first.cause, first.started, first.tried) == ("INFEASIBLE", "oom", None, ())
    assert first.reason == "needs 2.7 GiB by estimate, a worker has 0.6 GiB: not tried"
    assert not sweep.folder.trial_log(0).exists()


def test_a_trial_that_runs_out_of_its_workers_memory_is_tried_with_half_the_rows_and_then_infeasible(resumed):
    record = resumed[0][1]
    assert (record.outcome, record.cause) == ("INFEASIBLE", "oom")
    assert "allocate" in record.reason
    (attempt,) = record.tried
    assert (attempt.cause, attempt.changed[ROWS]) == ("oom", 16)


def test_what_ran_out_of_memory_is_not_proposed_again_and_the_count_is_exact_before_and_after_a_resume(resumed):
    before, sweep = resumed
    after = sweep.records()
    for records, trials in ((before, 3), (after, 4)):
        tried = [record.point[ROWS] for record in records if record.started]
        assert tried[0] == 32
        assert tried[1:] == [2] * (trials - 1)
    assert after[: len(before)] == before
    known = [record for record in after[2:] if not record.started and record.point[ROWS] == 32]
    assert known
    for record in known:
        assert record.reason == "needs at least the memory of trial 1, which ran out of it: not tried"
    assert (sweep.status, sweep.summary()["trials"]) == ("finished", 4)
