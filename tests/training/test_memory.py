"""What points need by estimate, what a worker has, and which points follow to be impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.execution.impossible import Impossible
from tuner.spec.load import parse_spec
from tuner.spec.space import resolve
from tuner.spec.sweep import ResourcesSpec, SweepSpec
from tuner.training import room
from tuner.training.memory import estimate, find_room, largest_trial
from tuner.training.room import keep_to_room, room_of_worker

GIB = 2**30
DATA = {"train_tokens": 4000, "rows_train": 100}
"""Of a data set with rows of 40 tokens."""


def choice(*values: Any) -> dict[str, Any]:
    return {"type": "choice", "values": list(values)}


def spec_for(model: Path, folder: Path, space: dict[str, Any], **sections: Any) -> SweepSpec:
    (folder / "rows.jsonl").write_text('{"text": "a row"}\n')
    values = {
        "name": "memory",
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"path": "rows.jsonl"},
        "space": space,
        "budget": {"trials": 3, "tokens_per_trial": 1000},
    }
    return parse_spec(values | sections, folder)


def test_the_largest_trial_is_the_one_that_needs_most(tiny_model_dir, tmp_path):
    space = {
        "lora.target_modules": choice("q_proj", "all-linear", "o_proj"),
        "lora.r": choice(4, 32, 8),
        "train.optim": choice("sgd", "adamw_torch"),
        "train.max_length": choice(None, 64),
    }
    point = largest_trial(spec_for(tiny_model_dir, tmp_path, space), tmp_path)["point"]
    assert point == {
        "lora.target_modules": "all-linear",
        "lora.r": 32,
        "train.optim": "adamw_torch",
        "train.max_length": None,
    }


def test_rows_that_are_not_packed_count_with_the_tokens_they_have(tiny_model_dir, tmp_path):
    space = {"train.packing": choice("none", "bfd")}
    spec = spec_for(tiny_model_dir, tmp_path, space, train={"max_length": 400})
    alone, packed = (resolve(spec, 0, {"train.packing": how}) for how in ("none", "bfd"))
    needs = lambda config, *row_tokens: estimate(config, spec.resources, tmp_path, *row_tokens).activations  # noqa: E731
    assert needs(packed, 40.0) == needs(alone) == 10 * needs(alone, 40.0)


def test_a_trial_that_cannot_be_made_is_judged_by_nobody(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path, {"lora.target_modules": choice("no_such_module")})
    found = find_room(spec, tmp_path, DATA, beside=1)
    assert found.holds_all
    judge = Impossible(spec, found.as_dict() | {"holds_all": False, "size": 1})
    assert judge.why(resolve(spec, 0, {"lora.target_modules": "no_such_module"})) is None


@pytest.mark.parametrize(
    ("asked", "gpu", "beside", "has"),
    [
        ({}, None, 1, 0.9 * 32),
        ({}, None, 4, 0.9 * 8),
        ({"memory_per_worker": 2 * GIB}, None, 4, 2),
        ({"memory_per_worker": 12 * GIB}, None, 4, 0.9 * 8),
        ({}, 80, 4, 0.9 * 80),
        ({"gpus_per_worker": 0.25}, 80, 4, 0.9 * 20),
        ({"gpus_per_worker": 2, "memory_per_worker": 8 * GIB}, 80, 1, 8),
    ],
    ids=str,
)
def test_what_a_worker_has(asked, gpu, beside, has, monkeypatch):
    monkeypatch.setattr(room, "_memory_here", lambda: 32 * GIB)
    a_device(monkeypatch, gpu)
    assert room_of_worker(ResourcesSpec(**asked), beside) == pytest.approx(has * GIB)


@pytest.mark.parametrize(
    ("asked", "fraction"),
    [({}, None), ({"gpus_per_worker": 0.5}, 0.45), ({"memory_per_worker": 8 * GIB}, 0.1)],
    ids=str,
)
def test_on_a_gpu_a_worker_is_kept_to_its_part(asked, fraction, monkeypatch):
    kept: list[float] = []
    a_device(monkeypatch, 80)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", kept.append)
    keep_to_room(ResourcesSpec(**asked))
    assert kept == ([] if fraction is None else [pytest.approx(fraction)])


def a_device(monkeypatch: pytest.MonkeyPatch, gib: int | None) -> None:
    """A GPU, which this machine need not have."""

    class Device:
        total_memory = (gib or 0) * GIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gib is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)


SPACE = {"train.per_device_train_batch_size": choice(1, 8, 64, 512), "lora.r": choice(4, 64)}


def needs(spec: SweepSpec, folder: Path, rows: int, rank: int) -> int:
    config = resolve(spec, 0, {"train.per_device_train_batch_size": rows, "lora.r": rank})
    return estimate(config, spec.resources, folder, 40.0).total


def test_a_point_is_impossible_where_half_its_rows_at_once_are_too_many(tiny_model_dir, tmp_path):
    whole = spec_for(tiny_model_dir, tmp_path, SPACE)
    assert find_room(whole, tmp_path, DATA, beside=1).holds_all
    least = needs(whole, tmp_path, 256, 4)
    spec = spec_for(tiny_model_dir, tmp_path, SPACE, resources={"memory_per_worker": least})
    found = find_room(spec, tmp_path, DATA, beside=1)
    assert (found.size, found.device, found.row_tokens, found.holds_all) == (least, "cpu", 40.0, False)
    judge = Impossible(spec, found.as_dict())
    points = [(512, 64), (512, 4), (64, 64)]
    said = [
        judge.why(resolve(spec, 0, {"train.per_device_train_batch_size": rows, "lora.r": rank}))
        for rows, rank in points
    ]
    more = needs(spec, tmp_path, 256, 64)
    assert said == [f"needs {more / GIB:.1f} GiB by estimate, a worker has {least / GIB:.1f} GiB", None, None]


def test_what_ran_out_of_memory_rules_out_all_that_needs_at_least_as_much(tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, tmp_path, SPACE)
    found = find_room(spec, tmp_path, DATA, beside=1)
    judge = Impossible(spec, found.as_dict())
    point = lambda rows, r: resolve(spec, 7, {"train.per_device_train_batch_size": rows, "lora.r": r})  # noqa: E731
    assert judge.why(point(512, 64)) is None
    judge.ran_out(7, point(32, 64) | {"train": {"per_device_train_batch_size": 32}})  # its second try, of 64
    said = "needs at least the memory of trial 7, which ran out of it"
    assert [judge.why(point(rows, 64)) for rows in (8, 64, 512)] == [None, said, said]
    assert judge.why(point(64, 4)) is None  # a smaller adapter: who knows
