"""The step plan is what the trainer then does, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback
from trl import pack_dataset

from tuner.errors import InfeasibleError
from tuner.spec.trial import TrialConfig, milestones
from tuner.training.budget import plan_steps
from tuner.training.model import load_model, load_tokenizer
from tuner.training.trial import build_trainer, sft_config

MODEL = {
    "revision": "main",
    "gguf_file": None,
    "dtype": "float32",
    "quantization": "none",
    "attn_implementation": None,
    "trust_remote_code": False,
}


def rows_of_many_lengths(count: int = 23) -> Dataset:
    rows = [[5 + (7 * i + j) % 900 for j in range(3 + (i * 5) % 29)] for i in range(count)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def trainer_for(tiny_model_dir: Path, tmp_path: Path, **train: object):
    model = {"name": str(tiny_model_dir), **MODEL}
    config: TrialConfig = {
        "number": 0,
        "point": {},
        "model": model,
        "train": {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **train},
        "lora": {"r": 4},
    }
    rows = rows_of_many_lengths()
    if train.get("packing", "none") != "none":
        rows = pack_dataset(rows, 32, train["packing"])
    args = sft_config(config, tmp_path / "out")
    return build_trainer(config, load_model(model, tmp_path), load_tokenizer(model, tmp_path), rows, args)


class CountTokens(TrainerCallback):
    """Reads the trainer's own count of trained tokens after every step."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.after_step: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after_step.append(int(self.trainer._total_train_tokens))


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"packing": "bfd"},
        {"packing": "bfd_split"},
        {"packing": "wrapped"},
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 3, "dataloader_drop_last": True},
        {"seed": 11, "data_seed": 5, "per_device_train_batch_size": 5},
    ],
    ids=str,
)
def test_the_plan_counts_the_tokens_the_trainer_trains(train, tiny_model_dir, tmp_path):
    trainer = trainer_for(tiny_model_dir, tmp_path, **train)
    plan = plan_steps(trainer, milestones(900, 3))  # well past one epoch of 391 tokens
    trainer.args.max_steps = plan.max_steps
    counter = CountTokens(trainer)
    trainer.add_callback(counter)
    trainer.train()
    assert len(counter.after_step) == plan.max_steps
    for (step, (milestone, tokens)), expected in zip(plan.evaluations.items(), [300, 600, 900], strict=True):
        assert milestone == expected
        assert counter.after_step[step - 1] == tokens >= milestone
        assert counter.after_step[step - 2] < milestone


def test_the_learning_rate_schedule_ends_with_the_budget(tiny_model_dir, tmp_path):
    trainer = trainer_for(tiny_model_dir, tmp_path, lr_scheduler_type="linear")
    trainer.args.max_steps = plan_steps(trainer, milestones(400, 2)).max_steps
    trainer.train()
    assert trainer.state.global_step > 10
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}


def test_a_step_larger_than_the_distance_between_evaluations_is_infeasible(tiny_model_dir, tmp_path):
    trainer = trainer_for(tiny_model_dir, tmp_path, per_device_train_batch_size=16)
    with pytest.raises(InfeasibleError, match=r"one optimizer step trains \d+ tokens, more than the 20"):
        plan_steps(trainer, milestones(200, 10))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("train", "rows"),
    [
        ({"per_device_train_batch_size": 24}, "23 rows to train on"),
        ({"per_device_train_batch_size": 16, "packing": "bfd"}, "rows to train on after packing"),
        ({"per_device_train_batch_size": 24, "gradient_accumulation_steps": 4}, "23 rows to train on"),
        ({"per_device_train_batch_size": 24, "train_sampling_strategy": "group_by_length"}, "23 rows to train on"),
    ],
    ids=str,
)
def test_an_epoch_without_a_batch_is_infeasible(train, rows, tiny_model_dir, tmp_path):
    trainer = trainer_for(tiny_model_dir, tmp_path, dataloader_drop_last=True, **train)
    with pytest.raises(InfeasibleError, match=f"an epoch has no batch: there are .*{rows}, a batch takes"):
        plan_steps(trainer, milestones(200, 2))
