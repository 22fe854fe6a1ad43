"""Whether an epoch can have a batch at all, where only whole batches are trained and the rows can be counted."""

from __future__ import annotations

import csv
import os
from itertools import islice
from pathlib import Path

from tuner.errors import Problem
from tuner.spec.checks.fields import place_of, possible_values
from tuner.spec.checks.words import show
from tuner.spec.sweep import SweepSpec

BATCH_SIZE = "train.per_device_train_batch_size"
DROP_LAST = "train.dataloader_drop_last"


def check_batch(spec: SweepSpec) -> list[Problem]:
    """Find batch sizes above the number of rows, where `dataloader_drop_last` leaves out what fills no batch.

    The smallest batch counts: where the size is searched, a trial with a larger one is infeasible by itself. Packings
    that split documents may make more rows of them, and are left to the trial.
    """
    packings = possible_values(spec, "train.packing")
    if possible_values(spec, DROP_LAST) != [True] or not set(packings) <= {"none", "bfd", None}:
        return []
    sizes = possible_values(spec, BATCH_SIZE)
    if not all(isinstance(size, int) for size in sizes):
        return []
    size = min(sizes)
    rows = _rows_up_to(Path(spec.data.path), size)
    if spec.data.max_train_examples is not None:
        rows = min(size, spec.data.max_train_examples) if rows is None else min(rows, spec.data.max_train_examples)
    if rows is None or rows >= size:
        return []
    allowed = f"at most {rows}, the rows of data.path, or {DROP_LAST}: false; else an epoch has no batch"
    return [Problem(place_of(spec, BATCH_SIZE), show(size), allowed)]


def _rows_up_to(path: Path, most: int) -> int | None:
    """The rows of a file of lines or of CSV, counted no further than `most`; None of what cannot be counted lightly."""
    suffix = path.suffix.lower()
    if not os.path.isfile(path) or suffix not in (".jsonl", ".ndjson", ".csv", ".tsv"):
        return None
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            if suffix in (".csv", ".tsv"):
                records = csv.reader(stream, delimiter="\t" if suffix == ".tsv" else ",")
                return max(0, sum(1 for _ in islice(filter(None, records), most + 1)) - 1)
            return sum(1 for _ in islice(filter(str.strip, stream), most))
    except (OSError, csv.Error):  # reading the data says what is wrong
        return None
