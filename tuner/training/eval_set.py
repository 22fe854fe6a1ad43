"""The evaluation set of a sweep: kept as a copy of its own, and held against its fingerprint before it is used."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import datasets

from tuner.spec.layout import SweepFolder


def fingerprint(rows: datasets.Dataset) -> str:
    """Hash of the token ids and labels of every row, in order; of nothing else that a file may hold."""
    digest = hashlib.sha256()
    for batch in rows.iter(batch_size=1000):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            digest.update(f"{ids} {labels}\n".encode())
    return digest.hexdigest()


def damage_of(folder: Path, expected: str) -> str | None:
    """Why the rows saved in a folder are not those of this fingerprint; None where they are."""
    try:  # a border: a file may be missing, cut short or another's, and each library says so with its own error
        rows = datasets.load_from_disk(str(folder))
        rows.data.validate(full=True)  # Arrow follows offsets into nowhere unless they were checked
        found = fingerprint(rows)
    except Exception as error:
        return f"it cannot be read, {(str(error).splitlines() or [type(error).__name__])[0]}"
    return None if found == expected else f"its {len(rows)} rows are not those that the sweep began with"


def keep_eval_set(sweep: SweepFolder, made: Path) -> None:
    """Put a copy of prepared evaluation rows in the place of the sweep's own."""
    draft = sweep.root.cache / "data" / f"eval-of-{sweep.name}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(made, draft)
    sweep.root.forget(sweep.eval_rows)
    sweep.path.mkdir(parents=True, exist_ok=True)
    draft.rename(sweep.eval_rows)
    sweep.root.keep(sweep.eval_rows)
