"""Where only whole batches are trained, there must be rows for one: known before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuner.spec.check import check_values


def problems(tmp_path: Path, rows: int, suffix: str = ".jsonl", space: Any = None, data: Any = None, **train: Any):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text("text\n" + "".join(f'"row\n{number}"\n' for number in range(rows)))
    else:
        path.write_text("".join(f'{{"text": "row {number}"}}\n\n' for number in range(rows)))
    values = {
        "name": "few",
        "model": {"name": "some/base"},
        "data": {"path": str(path), "format": "text", **(data or {})},
        "train": {"dataloader_drop_last": True, **train},
        "space": {"train.learning_rate": {"type": "log_uniform", "low": 1e-5, "high": 1e-3}, **(space or {})},
        "budget": {"trials": 2, "tokens_per_trial": 1000, "evals_per_trial": 1},
        "search": {"sampler": "random"},
    }
    _, found = check_values(values, tmp_path, str(tmp_path / "runs"))
    return [str(problem) for problem in found]


SAID = (
    "got 8; allowed: at most 5, the rows of data.path, or train.dataloader_drop_last: false; else an epoch has no batch"
)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({}, "train.per_device_train_batch_size"),
        ({"suffix": ".csv"}, "train.per_device_train_batch_size"),
        ({"packing": "bfd", "max_length": 64}, "train.per_device_train_batch_size"),
        (
            {"space": {"train.per_device_train_batch_size": {"type": "choice", "values": [16, 8]}}},
            "space.train.per_device_train_batch_size",
        ),
    ],
    ids=str,
)
def test_rows_that_fill_no_batch_are_refused_before_anything_starts(arguments, key, tmp_path):
    assert problems(tmp_path, 5, **arguments) == [f"{key}: {SAID}"]


def test_max_train_examples_counts_where_it_is_less(tmp_path):
    (found,) = problems(tmp_path, 50, data={"max_train_examples": 5})
    assert SAID in found


@pytest.mark.parametrize(
    "arguments",
    [
        {"rows": 8},
        {"rows": 5, "dataloader_drop_last": False},
        {"rows": 5, "per_device_train_batch_size": 4},
        {"rows": 5, "packing": "wrapped", "max_length": 64},
        {"rows": 5, "space": {"train.per_device_train_batch_size": {"type": "choice", "values": [4, 8]}}},
    ],
    ids=str,
)
def test_what_may_have_a_batch_is_not_refused(arguments, tmp_path):
    assert problems(tmp_path, **arguments) == []
