"""What a sweep takes at most, against what is then there: a real adapter's size, and what the spec says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tuner.spec.load import parse_spec
from tuner.training.worst_case import WorstCase, worst_case


def most(model: Path, folder: Path, **budget: Any) -> WorstCase:
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    values = {
        "name": "most",
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"path": "rows.jsonl", "max_eval_examples": 50},
        "train": {"max_length": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "space": {"lora.r": {"type": "choice", "values": [4, 16, 8]}},
        "budget": {"trials": 3, "evals_per_trial": 4, **budget},
        "resources": {"max_concurrent_trials": 2},
        "storage": {"keep_best": 1},
    }
    return worst_case(parse_spec(values, folder))


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [
        ({"tokens_per_trial": 1000}, 3000),
        ({"tokens_per_trial": 1000, "tokens": 2500}, 2500),
        ({"steps_per_trial": 10}, 3 * 10 * 8 * 32),
        ({"epochs_per_trial": 2}, None),
    ],
    ids=str,
)
def test_tokens_of_every_kind_of_budget(budget, tokens, tiny_model_dir, tmp_path):
    found = most(tiny_model_dir, tmp_path, **budget)
    assert (found.trials, found.tokens, found.evaluated_rows) == (3, tokens, (3 * 4 + 1) * 50)


def test_disk_is_that_of_the_largest_adapter_as_often_as_it_may_lie_there(tiny_model_dir, tmp_path):
    found = most(tiny_model_dir, tmp_path, tokens_per_trial=1000)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    weights = sum(weight.numel() * weight.itemsize for weight in base.parameters())
    get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    saved = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert found.adapter_bytes == pytest.approx(saved, rel=0.05)
    assert found.disk_bytes == pytest.approx((2 * 6 + 1) * saved + 2 * (weights + saved), rel=0.05)
    assert found.memory.total > weights
    assert found.as_dict()["memory_bytes"] == found.memory.total
