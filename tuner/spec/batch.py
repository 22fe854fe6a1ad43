"""The rows of an optimizer step: how they are divided into batches, among workers, and when memory runs out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.errors import InfeasibleError


def batch_of_one(train: Mapping[str, Any]) -> tuple[int, int]:
    """Rows in a batch and batches in a step of a trial that one worker trains, with these fields of SFTConfig."""
    return train.get("per_device_train_batch_size", 8), train.get("gradient_accumulation_steps", 1)


def share_of_batch(batch_size: int, accumulation: int, workers: int) -> tuple[int, int]:
    """`per_device_train_batch_size` and `gradient_accumulation_steps` of each worker, for the same rows in a step.

    Rows that were one after the other are beside each other where they can: memory per worker never grows. Raises
    InfeasibleError where the workers do not divide the rows of a step.
    """
    rows, rest = divmod(batch_size * accumulation, workers)
    if rest:
        raise InfeasibleError(
            "budget", f"a step of {batch_size} x {accumulation} rows cannot be divided among {workers} workers"
        )
    size = max(size for size in range(1, min(batch_size, rows) + 1) if rows % size == 0)
    return size, rows // size


def halved(train: Mapping[str, Any], workers: int) -> dict[str, int] | None:
    """Both fields for at most half the rows at once in each worker, and as many in a step; None where it is one row."""
    batch_size, accumulation = batch_of_one(train)
    rows = batch_size * accumulation
    at_once, _ = share_of_batch(batch_size, accumulation, workers)
    if at_once == 1:
        return None
    fewer = max(size for size in range(1, at_once // 2 + 1) if rows % size == 0)
    return {"per_device_train_batch_size": fewer, "gradient_accumulation_steps": rows // fewer}
