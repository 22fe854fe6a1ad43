"""The rows of a step, and fewer of them at once."""

from __future__ import annotations

import pytest

from tuner.spec.batch import batch_of_one, halved, share_of_batch


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "workers", "fewer"),
    [
        (8, 1, 1, (4, 2)),
        (8, 3, 1, (4, 6)),
        (1, 4, 1, None),
        (3, 1, 1, (1, 3)),
        (5, 4, 1, (2, 10)),
        (7, 3, 1, (3, 7)),
        (8, 1, 2, (2, 4)),  # each of the two had four of them
        (2, 1, 2, None),
        (2, 8, 4, (1, 16)),
    ],
)
def test_half_the_rows_at_once_are_as_many_in_a_step(batch_size, accumulation, workers, fewer):
    train = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    found = halved(train, workers)
    assert found == (None if fewer is None else dict(zip(train, fewer, strict=True)))
    if found:
        at_once, _ = share_of_batch(batch_size, accumulation, workers)
        again, steps = share_of_batch(*batch_of_one(found), workers)
        assert again <= at_once / 2
        assert again * steps * workers == batch_size * accumulation


def test_the_defaults_are_those_of_the_trainer():
    from trl import SFTConfig

    defaults = SFTConfig(use_cpu=True, bf16=False)
    assert batch_of_one({}) == (defaults.per_device_train_batch_size, defaults.gradient_accumulation_steps)
    assert halved({}, 1) == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
