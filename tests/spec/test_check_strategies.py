"""What `tuner check` says of workers and strategies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import Problem
from tuner.spec.check import check_values
from tuner.spec.sharing import why_not_shared
from tuner.spec.sweep import SweepSpec

ZERO2 = {"zero_optimization": {"stage": 2}}


def checked(tmp_path: Path, resources: dict[str, Any], **sections: Any) -> tuple[SweepSpec | None, list[Problem]]:
    """A spec that is right without these sections: as it is resolved, and what is found."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    values = {
        "name": "checked",
        "model": {"name": "org/model"},
        "data": {"path": "rows.jsonl"},
        "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-4, "high": 1e-3}},
        "budget": {"trials": 4, "tokens_per_trial": 1000},
        "resources": {"workers_per_trial": 2, **resources},
    }
    return check_values(values | sections, tmp_path)


def problems(tmp_path: Path, resources: dict[str, Any], **sections: Any) -> dict[str, str]:
    """What is found, by key."""
    _, found = checked(tmp_path, resources, **sections)
    return {problem.key: f"got {problem.got}; allowed: {problem.allowed}" for problem in found}


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_every_strategy_is_right_by_itself(strategy, tmp_path):
    assert problems(tmp_path, {"strategy": strategy}) == {}


@pytest.mark.parametrize(
    ("quantization", "right"),
    [
        ("nf4", {"auto", "ddp", "fsdp", "zero1", "zero2"}),
        ("int8", {"auto", "ddp"}),
    ],
)
def test_quantised_bases_are_shared_as_the_libraries_can(quantization, right, tmp_path):
    model = {"name": "org/model", "quantization": quantization}
    for strategy in ("auto", "ddp", "fsdp", "zero1", "zero2", "zero3"):
        found = problems(tmp_path, {"strategy": strategy}, model=model)
        assert list(found) == ([] if strategy in right else ["resources.strategy"]), strategy


def test_a_refused_quantisation_says_why_and_what_can_be(tmp_path):
    found = problems(tmp_path, {"strategy": "zero3"}, model={"name": "org/model", "quantization": "nf4"})
    assert "ZeRO-3 parts a weight while it is loaded, before it can be quantised" in found["resources.strategy"]
    assert "nf4 with auto, ddp, fsdp, zero1 or zero2" in found["resources.strategy"]


@pytest.mark.parametrize(
    ("resources", "key", "words"),
    [
        ({"offload": True}, "resources.offload", "auto shards nothing"),
        ({"strategy": "fsdp", "gpus_per_worker": 0}, "resources.strategy", "there it becomes ddp"),
        ({"deepspeed": ZERO2}, "resources.strategy", "got 'auto'; allowed: zero2"),
        ({"strategy": "zero3", "deepspeed": ZERO2}, "resources.strategy", "got 'zero3'; allowed: zero2"),
        ({"strategy": "zero2", "deepspeed": {}}, "resources.deepspeed.zero_optimization.stage", "allowed: 1, 2 or 3"),
        ({"strategy": "zero2", "deepspeed": "none.json"}, "resources.deepspeed", "No such file"),
        ({"strategy": "zero2", "deepspeed": "list.json"}, "resources.deepspeed", "it holds list"),
        (
            {"strategy": "zero2", "deepspeed": ZERO2 | {"train_batch_size": 32}},
            "resources.deepspeed.train_batch_size",
            "'auto', since train.per_device_train_batch_size says it",
        ),
        (
            {"strategy": "zero2", "deepspeed": ZERO2 | {"bf16": {"enabled": True}}},
            "resources.deepspeed.bf16.enabled",
            "'auto', since model.dtype says it",
        ),
        ({"strategy": "zero2", "deepspeed": ZERO2 | {"bf16": True}}, "resources.deepspeed.bf16", "keys and values"),
        (
            {"strategy": "zero2", "deepspeed": ZERO2 | {"optimizer": {"type": "AdamW"}}},
            "resources.deepspeed.optimizer",
            "the trainer has its own",
        ),
        (
            {"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 2, "overlap_com": True}}},
            "resources.deepspeed.zero_optimization.overlap_com",
            "an unknown key",
        ),
        ({"strategy": "ddp", "fsdp": {}}, "resources.strategy", "fsdp, since resources.fsdp is given"),
        ({"strategy": "fsdp", "fsdp": {"version": 1}}, "resources.fsdp.version", "it is FSDP2"),
        ({"strategy": "fsdp", "fsdp": {"cpu_offload": True}}, "resources.fsdp.cpu_offload", "resources.offload"),
        ({"strategy": "fsdp", "fsdp": {"reshard": True}}, "resources.fsdp.reshard", "an unknown key"),
        (
            {"strategy": "fsdp", "fsdp": {"activation_checkpointing": True}},
            "resources.fsdp.activation_checkpointing",
            "one of the two",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_contradiction_is_named(resources, key, words, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    found = problems(tmp_path, resources)
    assert list(found) == [key]
    assert words in found[key]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_the_shipped_files_are_accepted_and_stand_in_the_resolved_spec(name, tmp_path):
    file = Path(__file__).parents[2] / "cluster" / "deepspeed" / f"{name}.json"
    assert problems(tmp_path, {"strategy": name, "deepspeed": str(file)}) == {}
    spec, _ = checked(tmp_path, {"strategy": name, "deepspeed": str(file)})
    assert spec is not None
    assert spec.resources.deepspeed == json.loads(file.read_text())


@pytest.mark.parametrize(
    ("train", "space", "wrong"),
    [
        ({"per_device_train_batch_size": 3}, {}, "train.per_device_train_batch_size"),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, {}, None),
        ({}, {"type": "int", "low": 1, "high": 4}, "space.train.per_device_train_batch_size"),
        ({}, {"type": "int", "low": 2, "high": 6, "step": 2}, None),
        ({}, {"type": "int", "low": 2, "high": 10**18, "step": 2}, None),
        ({}, {"type": "int", "low": 2, "high": 10**18}, "space.train.per_device_train_batch_size"),
        ({}, {"type": "choice", "values": [2, 4, 5]}, "space.train.per_device_train_batch_size"),
    ],
)
def test_workers_must_divide_the_rows_of_every_step(train, space, wrong, tmp_path):
    searched = (
        {"train.per_device_train_batch_size": space} if space else {"lora.r": {"type": "choice", "values": [4, 8]}}
    )
    found = problems(tmp_path, {}, train=train, space=searched)
    assert list(found) == ([wrong] if wrong else [])
    assert all("resources.workers_per_trial, 2, divides" in text for text in found.values())


@pytest.mark.parametrize(
    ("strategy", "optim", "words"),
    [
        ("fsdp", "adamw_bnb_8bit", "only torch's own optimizers know the sharded weights"),
        ("fsdp", "adafactor", "only torch's own optimizers know the sharded weights"),
        ("zero2", "adafactor", "ZeRO flattens weights"),
        ("zero3", "adamw_bnb_8bit", None),
        ("ddp", "adafactor", None),
    ],
)
def test_optimizers_are_refused_where_they_fail_or_compute_otherwise(strategy, optim, words, tmp_path):
    found = problems(tmp_path, {"strategy": strategy}, train={"optim": optim})
    assert list(found) == (["train.optim"] if words else [])
    assert all(words in text for text in found.values())


def test_a_sharded_trial_shares_no_base_with_others_not_even_one_of_one_worker(tmp_path):
    spec, _ = checked(tmp_path, {"strategy": "zero3", "offload": True, "workers_per_trial": 1})
    assert spec is not None
    assert why_not_shared(spec) == ["resources.strategy is zero3"]


def test_an_order_that_each_worker_would_draw_for_itself_is_refused(tmp_path):
    found = problems(tmp_path, {}, train={"train_sampling_strategy": "group_by_length"})
    assert "an order of their own" in found["train.train_sampling_strategy"]
