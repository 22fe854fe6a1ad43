"""Errors travel from a worker to the driver: what arrives is what was raised."""

from __future__ import annotations

import pickle

import pytest

from tuner.errors import DataError, InfeasibleError, JobError, Problem, PromotionRefused, SpecError


@pytest.mark.parametrize(
    "error",
    [
        InfeasibleError("oom", "out of memory at 4,000 tokens"),
        SpecError([Problem("lora.r", "0", "1 or more", None)], "sweep.yaml"),
        PromotionRefused(["worse than the base"]),
        JobError("no GPU there", 3),
        DataError("rows.jsonl, line 3: not JSON"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_pickling(error):
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error) != ""
    assert vars(arrived) == vars(error)
