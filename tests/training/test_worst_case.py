"""What a sweep takes at most, against what is then there: a real adapter's size, and what the spec says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tuner.errors import TunerError
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


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("", "is not a valid JSON file"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "nosuch"}', "`nosuch`"),
        ('{"model_type": "llama", "hidden_size": "many"}', "expected int, got str"),
        ('{"model_type": "llama", "hidden_size": 63}', "not a multiple of the number of attention heads"),
        ('{"model_type": "vit"}', "Unrecognized configuration class"),
        (None, "couldn't"),
    ],
)
def test_of_a_model_that_cannot_be_made_there_is_no_plan_but_a_reason(config, reason, tmp_path):
    values = {"name": "none", "model": {"name": "nobody/nothing"}, "data": {"path": "org/rows"}}
    if config is not None:
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(config)
        (tmp_path / "base" / "model.safetensors").touch()
        values["model"] = {"name": "base"}
    space = {"lora.r": {"type": "int", "low": 4, "high": 8}}
    spec = parse_spec(values | {"space": space, "budget": {"trials": 2, "tokens_per_trial": 100}}, tmp_path)
    with pytest.raises(TunerError) as caught:
        worst_case(spec)
    assert str(caught.value).startswith("there is no plan, since model.name ")
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == (3 if config is None else 1)  # nobody can be asked for the last


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
