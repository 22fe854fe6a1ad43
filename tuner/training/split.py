"""Split a data file into what is trained on and what is held out, the same way for every trial of a sweep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.errors import DataError
from tuner.spec.drops import Drops, describe_drops
from tuner.training.data import source_fingerprint
from tuner.training.examples import formatter_source, read_examples

if TYPE_CHECKING:
    import datasets

Progress = Callable[[str, int, int], None]
"""Called with the stage, how much is done, and of how much (0: not known)."""


def rows_key(data: Mapping[str, Any], text_field: str) -> dict[str, Any]:
    """Return all that the split depends on: what the files hold and how they are read, never how a trial trains."""
    key = {name: data[name] for name in ("format", "columns", "template", "formatter", "max_eval_examples", "seed")}
    key |= {"max_train_examples": data["max_train_examples"], "text_field": text_field}
    key["source"] = source_fingerprint(data, data["path"])
    if data["eval_path"]:
        key["eval_source"] = source_fingerprint(data, data["eval_path"])
    else:
        key["eval_fraction"] = data["eval_fraction"]
    if data["formatter"]:
        key["formatter_source"] = hashlib.sha256(formatter_source(data["formatter"])).hexdigest()
    return key


def build_rows(data: Mapping[str, Any], text_field: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write the folders `train` and `eval` (columns number, row: an example as JSON) and return the counts.

    Training rows whose content also stands in the evaluation rows are left out and counted. Both sets keep the order
    of the file. Raises `DataError` when a file is unusable or either set ends up empty.
    """
    name = Path(data["path"]).name
    rows, summary = _usable_rows(data, data["path"], text_field, folder / "all.arrow", progress)
    order = _permutation(len(rows), data["seed"])
    if data["eval_path"]:
        eval_rows, found = _usable_rows(data, data["eval_path"], text_field, folder / "eval.arrow", progress)
        summary |= {f"eval_{key}": value for key, value in found.items()}
        held_out = _permutation(len(eval_rows), data["seed"])[: data["max_eval_examples"]]
        known = {_digest(row) for row in _texts(eval_rows)}
    else:
        if len(rows) < 2:
            raise DataError(f"{name}: one usable row cannot be both trained on and held out; {_account(summary)}")
        share = max(1, round(len(rows) * data["eval_fraction"]))
        held_out = order[: min(share, data["max_eval_examples"], len(rows) - 1)]
        eval_rows, order = rows, order[len(held_out) :]
        known = {_digest(row) for row in _texts(rows.select(held_out))}
    leaked = {index for index, row in enumerate(_texts(rows)) if _digest(row) in known}
    clean = [index for index in order if index not in leaked]
    summary["duplicates_removed"] = len(order) - len(clean)
    if not clean:
        raise DataError(
            f"{name}: nothing left to train on: all {len(order)} usable rows also stand in the evaluation set; "
            f"{_account(summary)}"
        )
    digest = hashlib.sha256()
    summary["rows_train"] = _save(rows, clean[: data["max_train_examples"]], folder / "train", digest)
    summary["rows_eval"] = _save(eval_rows, held_out, folder / "eval", digest)
    summary["fingerprint"] = digest.hexdigest()
    for file in folder.glob("*.arrow"):
        file.unlink()
    return summary


def _usable_rows(
    data: Mapping[str, Any], path: str, text_field: str, file: Path, progress: Progress
) -> tuple[datasets.Dataset, dict[str, Any]]:
    import datasets

    drops: Drops = {}
    kind, unused, examples = read_examples(data, path, text_field, drops)
    count = _write(examples, file, progress)
    read = count + sum(entry["count"] for entry in drops.values())
    summary = {"format": kind, "columns_unused": unused, "rows_read": read, "dropped": drops}
    if not count:
        raise DataError(f"{Path(path).name}: no usable row; {_account(summary)}")
    return datasets.Dataset.from_file(str(file)), summary


def _write(examples: Iterator[tuple[int, str]], file: Path, progress: Progress) -> int:
    import pyarrow as pa

    schema = pa.schema({"number": pa.int64(), "row": pa.string()})
    count = 0
    with pa.ipc.new_stream(str(file), schema) as writer:
        for batch in _batched(examples, 1000):
            writer.write_batch(pa.record_batch([list(column) for column in zip(*batch, strict=True)], schema=schema))
            count += len(batch)
            progress("Reading the data", count, 0)
    return count


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _permutation(count: int, seed: int) -> list[int]:
    """RandomState, because numpy promises that its stream never changes."""
    return np.random.RandomState(seed).permutation(count).tolist()


def _texts(rows: datasets.Dataset) -> Iterator[str]:
    return (text for batch in rows.iter(batch_size=1000) for text in batch["row"])


def _digest(row: str) -> bytes:
    """Of the content, whatever the order of the keys."""
    return hashlib.blake2b(json.dumps(json.loads(row), sort_keys=True).encode(), digest_size=16).digest()


def _save(rows: datasets.Dataset, indices: list[int], folder: Path, digest: hashlib._Hash) -> int:
    chosen = rows.select(sorted(indices))
    chosen.save_to_disk(str(folder))
    digest.update(f"{folder.name}\n".encode())
    for text in _texts(chosen):
        digest.update(f"{text}\n".encode())
    return len(chosen)


def _account(summary: Mapping[str, Any]) -> str:
    return f"{summary['rows_read']} rows read, {describe_drops(summary['dropped'])}"
