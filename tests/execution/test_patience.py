"""A trial that is over by its own patience, as a slot on the shared base and with a base of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_sweeps import write_spec

import tuner
from tuner.spec.load import load_spec

pytestmark = pytest.mark.timeout(300)

IDLE, LEARNING = 1e-9, 5e-3


def test_a_trial_that_learns_nothing_ends_early_and_complete_wherever_it_trains(tiny_model_dir: Path, tmp_path: Path):
    file = write_spec(
        tmp_path,
        tiny_model_dir,
        "patient",
        space={
            "train.learning_rate": {"type": "choice", "values": [IDLE, LEARNING]},
            "lora.use_dora": {"type": "choice", "values": [False, True]},  # which trains apart
        },
        search={"sampler": "grid"},
        budget={"trials": 4, "tokens_per_trial": 8_000, "evals_per_trial": 4},
        stopping={"type": "none", "patience": 1, "min_delta": 0.01},
        resources={"share_base": 2},
        promotion=None,
        storage={"root": str(tmp_path / "runs")},
    )
    sweep = tuner.run(load_spec(file))
    trials = {(trial.point["train.learning_rate"], trial.point["lora.use_dora"]): trial for trial in sweep.records()}
    assert [trial.outcome for trial in trials.values()] == ["COMPLETED"] * 4
    for dora in (False, True):
        idle, learning = trials[IDLE, dora], trials[LEARNING, dora]
        assert [report.tokens for report in idle.reports] == [2_000, 4_000]
        assert (idle.cause, idle.reason) == ("no improvement", "no better eval_loss in 1 evaluations, at 4000 tokens")
        assert [report.tokens for report in learning.reports] == [2_000, 4_000, 6_000, 8_000]
        assert learning.cause is None
    assert sweep.best.point["train.learning_rate"] == LEARNING
