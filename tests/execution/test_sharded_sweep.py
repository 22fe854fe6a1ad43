"""A sweep of sharded trials on real Ray: two workers each, ZeRO-3, to the promoted model."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from datasets import load_from_disk
from real_sweeps import write_spec
from transformers import AutoModelForCausalLM

import tuner
from tuner.cli.screens import sharing_text
from tuner.errors import MachineError
from tuner.execution.machine import place
from tuner.execution.verify import verify_trial
from tuner.spec.load import load_spec
from tuner.training.evaluation import score
from tuner.training.strategy import DEEPSPEED

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("shared_ray")]

ZERO_3 = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}


@pytest.fixture(scope="module")
def swept(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuner.Sweep:
    """The steps are those of one worker: 4 rows, of which each has two."""
    folder = tmp_path_factory.mktemp("zero3")
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": ZERO_3}))
    file = write_spec(
        folder,
        tiny_model_dir,
        "zero3",
        budget={"trials": 2, "epochs_per_trial": 4, "evals_per_trial": 2},
        resources={
            "workers_per_trial": 2,
            "strategy": "zero3",
            "deepspeed": "zero3.json",
            "max_concurrent_trials": 1,
        },
        promotion={"max_regression": 0.1},
    )
    ctrl_c = signal.getsignal(signal.SIGINT)
    sweep = tuner.run(load_spec(file, root=folder / "runs"))
    assert signal.getsignal(signal.SIGINT) is ctrl_c, "Ray Train was asked in the main thread, and keeps it"
    return sweep


def test_a_sweep_of_zero_3_trials_runs_to_its_promoted_model(swept):
    assert swept.status == "finished"
    assert [record.outcome for record in swept.records()] == ["COMPLETED", "COMPLETED"], swept.records()
    assert [[report.step for report in record.reports] for record in swept.records()] == [[16, 32]] * 2
    assert swept.state().promoted["trial"] == swept.best.number, swept.state().promoted


def test_a_base_that_no_worker_holds_whole_is_scored_by_all_of_them(swept, tiny_model_dir):
    rows = load_from_disk(str(swept.folder.eval_rows))
    alone = score(AutoModelForCausalLM.from_pretrained(tiny_model_dir), rows).as_dict()
    assert swept.state().baseline == pytest.approx(alone, abs=1e-5)


def test_the_strategy_its_reason_and_the_estimate_stand_in_the_records(swept):
    sharing = swept.state().sharing
    assert sharing["strategy"]["name"] == "zero3"
    assert sharing["strategy"]["reason"].startswith("zero3: a worker needs 0.")
    assert sharing["strategy"]["estimated_bytes"]["base"] > 1e6
    assert "a trial has 2 workers; zero3: a worker needs" in sharing_text(sharing)
    assert swept.spec.resources.deepspeed == {"zero_optimization": ZERO_3}
    assert swept.spec.resources.deepspeed != DEEPSPEED["zero3"]


def test_one_worker_trains_the_same_from_its_seed(swept):
    found = verify_trial(swept.store, swept.best)
    assert found.agrees, found.largest
    assert found.largest["trained_tokens"] == 0


def test_fsdp_is_refused_on_workers_without_a_gpu(swept):
    resources = swept.spec.resources.model_copy(update={"strategy": "fsdp", "deepspeed": None})
    spec = swept.spec.model_copy(update={"resources": resources})
    with pytest.raises(MachineError, match="fsdp, which becomes ddp on workers without a GPU: use ddp, zero1"):
        place(spec, [{"CPU": 4}])
    assert place(spec, [{"CPU": 4, "GPU": 2}]).resources == {"CPU": 1.0, "GPU": 1.0}
