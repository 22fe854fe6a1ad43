"""What TRL, transformers and PEFT offer beside the plain trial: each option does what it is for, in a trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from test_trial import spec_for
from transformers import AutoModelForCausalLM

from tuner.spec.space import resolve
from tuner.spec.sweep import SweepSpec
from tuner.spec.trial import Report
from tuner.training import trial
from tuner.training.baseline import prepare_rows, prepare_sweep
from tuner.training.evaluation import score

EVALS = 5
TRAIN: dict[str, Any] = {
    "max_length": 48,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "gradient_checkpointing": False,
}


class CutOff(BaseException):
    """As if the machine had gone away."""


class Trial:
    """One trial of a sweep of its own, which may be begun again; its trainer is that of the last time."""

    def __init__(self, tiny_model_dir: Path, folder: Path, train: dict[str, Any], lora: dict[str, Any] | None):
        folder.mkdir(exist_ok=True)
        sections: dict[str, Any] = {"budget": {"trials": 4, "tokens_per_trial": EVALS * 280, "evals_per_trial": EVALS}}
        sections["space"] = {"train.weight_decay": {"type": "uniform", "low": 0, "high": 1}}  # which no trial here has
        self.spec: SweepSpec = spec_for(tiny_model_dir, folder, train=TRAIN | train, lora=lora, **sections)
        self.facts = prepare_sweep(self.spec, lambda stage, done, total: None)
        self.folder = folder

    def run(self, evals: int = EVALS, watch: Callable[[Any], None] = lambda trainer: None) -> list[Report]:
        """What is reported until the trial is over, or cut off; `watch` is shown the trainer before it trains."""
        reports: list[Report] = []

        def planned(*arguments: Any) -> Any:
            plan = plan_trial(*arguments)
            self.trainer = plan.trainer
            watch(plan.trainer)
            return plan

        def emit(report: Report, save: Callable[[Path], None]) -> None:
            reports.append(report)
            save(self.adapter(report))
            if len(reports) == evals < EVALS:
                raise CutOff

        plan_trial = trial.plan_trial
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trial, "plan_trial", planned)
            try:
                trial.run_trial(self.spec, resolve(self.spec, 0, {}), self.facts, self.folder / "out", emit)
            except CutOff:
                assert len(reports) == evals
        return reports

    def adapter(self, report: Report) -> Path:
        return self.folder / f"tokens-{report.tokens}"


@pytest.fixture
def trial_of(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Trial]:
    """A trial with these fields of `train` and `lora`."""

    def make(name: str = "a", lora: dict[str, Any] | None = {"r": 4}, **train: Any) -> Trial:  # noqa: B006
        return Trial(tiny_model_dir, tmp_path / name, train, lora)

    return make


FIGURES = ("tokens", "trained_tokens", "step", "epoch", "train_loss", "eval_loss", "learning_rate", "grad_norm")


def difference(some: list[Report], others: list[Report], figures: tuple[str, ...] = FIGURES) -> float:
    return max(abs(getattr(a, name) - getattr(b, name)) for a, b in zip(some, others, strict=True) for name in figures)


@pytest.mark.parametrize(
    ("train", "lora"),
    [
        (
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"},
            {"r": 4, "lora_dropout": 0.2},
        ),
        ({"optim": "adamw_8bit", "neftune_noise_alpha": 5, "packing": "bfd"}, {"r": 64, "use_dora": True}),
        ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, {"r": 4}),
        ({"optim": "adafactor", "learning_rate": 1e-3}, None),
    ],
    ids=str,
)
def test_a_trial_that_is_cut_off_goes_on_as_if_it_had_not_been(train, lora, trial_of):
    """Optimizer, schedule, random numbers, position in the second epoch, and the totals of the reports."""
    whole = trial_of("whole", lora, **train).run()
    again = trial_of("again", lora, **train)
    before = again.run(evals=4)  # in the second epoch
    assert before[-1].epoch > 1
    assert [folder.name for folder in (again.folder / "out").glob("checkpoint-*")] == [f"checkpoint-{before[-1].step}"]
    after = again.run()
    assert after[0] == before[-1]  # once more: nobody knows whether it was heard
    assert difference([*before, *after[1:]], whole) < 1e-5
    assert [report.duration_s for report in after] == sorted(report.duration_s for report in after)


def test_a_checkpoint_that_is_not_whole_is_not_gone_on_from(trial_of):
    again = trial_of()
    (before,) = again.run(evals=1)
    (again.folder / "out" / f"checkpoint-{before.step}" / "report.json").unlink()
    assert difference(again.run(evals=1), [before]) == 0


def test_a_trial_whose_optimizer_no_checkpoint_holds_begins_again(trial_of):
    again = trial_of(lora=None, optim="galore_adamw", optim_target_modules="all-linear", optim_args="rank=4")
    before = again.run(evals=1)
    assert difference(again.run(evals=1), before) < 1e-5
