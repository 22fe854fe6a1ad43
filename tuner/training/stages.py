"""The stages after the split: examples to tokens, tokens to what one kind of trial trains on, or to the evaluation set.

Each function fills a folder of the cache and returns its counts.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from trl import pack_dataset

from tuner.errors import DataError
from tuner.spec.drops import Drops, describe_drops, drop
from tuner.training.eval_set import fingerprint
from tuner.training.split import Progress
from tuner.training.tokens import IGNORED, Masking, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_CUT_OFF = "answer_cut_off"
_TOKENS = datasets.Features(
    {
        "number": datasets.Value("int64"),
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int64")),
        "problem": datasets.Value("string"),
    }
)


def build_tokens(
    rows: Path,
    tokenizer: PreTrainedTokenizerBase,
    rules: Masking,
    num_proc: int | None,
    folder: Path,
    report: Progress,
) -> dict[str, Any]:
    splits = {name: datasets.load_from_disk(str(rows / name)) for name in ("train", "eval")}
    total, done = sum(map(len, splits.values())), 0
    drops = {}
    for name, split in splits.items():
        # A progress callback cannot cross into other processes.
        steps = (lambda count, done=done: report("Tokenising", done + count, total)) if not num_proc else None
        with _scratch(folder) as work:
            mapped = split.map(
                _tokenize_batch,
                with_indices=True,
                fn_kwargs={"tokenizer": tokenizer, "rules": rules, "steps": steps},
                remove_columns=["row"],
                num_proc=num_proc,
                **_map_options(work, "tokens"),
            )
            kept, drops[name] = _kept(mapped)
            if not len(kept):
                purpose = "train" if name == "train" else "evaluate"
                raise DataError(f"nothing left to {purpose} on of {len(split)} rows; {describe_drops(drops[name])}")
            kept.select_columns(["number", "input_ids", "labels"]).save_to_disk(str(folder / name))
        done += len(split)
        report("Tokenising", done, total)
    return {"dropped": drops["train"], "eval_dropped": drops["eval"]}


def _tokenize_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    rules: Masking,
    steps: Callable[[int], None] | None,
) -> dict[str, list[Any]]:
    results = [tokenize(json.loads(row), tokenizer, rules) for row in batch["row"]]
    if steps:
        steps(indices[-1] + 1)
    return {
        "number": batch["number"],
        "input_ids": [[] if isinstance(result, str) else result[0] for result in results],
        "labels": [[] if isinstance(result, str) else result[1] for result in results],
        "problem": [result if isinstance(result, str) else None for result in results],
    }


def build_train(tokens: Path, key: Mapping[str, Any], folder: Path, report: Progress) -> dict[str, Any]:
    """Truncate, shuffle and pack in TRL's order; `key` holds packing, max_length,
    truncation_mode, and a seed when `shuffle_dataset` is on.

    `bfd` cuts what is too long while it packs. It is cut here first, which comes to the same, so that a row whose
    answer is lost can be counted instead of filling a pack with nothing to learn.
    """
    packing, max_length = key["packing"], key["max_length"]
    rows = datasets.load_from_disk(str(tokens))
    report("Packing", 0, len(rows))
    with _scratch(folder) as work:
        if packing in ("none", "bfd"):
            mode = key["truncation_mode"] if packing == "none" else "keep_start"
            rows, counts = _truncated(rows, max_length, mode, work)
        else:
            counts = {"dropped": {}, "truncated": 0}
        counts["rows"] = len(rows)
        if not len(rows):
            raise DataError(
                f"nothing left to train on with max_length {max_length}; {describe_drops(counts['dropped'])}"
            )
        rows = rows.select_columns(["input_ids", "labels"])
        if packing != "none":
            if max_length is None:
                raise DataError(f"train.max_length: packing {packing} needs a length to fill")
            if "seed" in key:
                rows = rows.shuffle(seed=key["seed"], keep_in_memory=True)
            rows = pack_dataset(rows, max_length, packing, _map_options(work, "packed", features=False))
        if "seed" in key:
            rows = rows.shuffle(seed=key["seed"], keep_in_memory=True)
        rows.save_to_disk(str(folder / "rows"))
    report("Packing", counts["rows"], counts["rows"])
    return counts | _count(rows) | {"sequences": len(rows)}


def build_eval(tokens: Path, max_length: int | None, mode: str, folder: Path) -> dict[str, Any]:
    with _scratch(folder) as work:
        rows, counts = _truncated(datasets.load_from_disk(str(tokens)), max_length, mode, work)
        rows = rows.select_columns(["input_ids", "labels"])
        counts |= {"rows": len(rows), "fingerprint": fingerprint(rows), **_count(rows)}
        if not counts["predicted"]:
            raise DataError(
                f"nothing left to evaluate on with max_length {max_length}; {describe_drops(counts['dropped'])}"
            )
        rows.save_to_disk(str(folder / "rows"))
    return counts


def _truncated(
    rows: datasets.Dataset, max_length: int | None, mode: str, work: Path
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Cut rows at `max_length` tokens; those left without a target are dropped, the others that were cut counted."""
    if max_length is None:
        return rows, {"dropped": {}, "truncated": 0}
    cut = slice(None, max_length) if mode == "keep_start" else slice(-max_length, None)
    mapped = rows.map(_truncate_batch, fn_kwargs={"cut": cut}, **_map_options(work, "truncated"))
    kept, drops = _kept(mapped)
    too_long = sum(pc.sum(pc.greater(lengths, max_length)).as_py() for lengths in _lengths(rows))
    dropped = sum(entry["count"] for entry in drops.values())
    return kept, {"dropped": drops, "truncated": too_long - dropped}


def _truncate_batch(batch: dict[str, list[Any]], cut: slice) -> dict[str, list[Any]]:
    labels = [row[cut] for row in batch["labels"]]
    return {
        "number": batch["number"],
        "input_ids": [row[cut] for row in batch["input_ids"]],
        "labels": labels,
        "problem": [None if any(label != IGNORED for label in row) else ANSWER_CUT_OFF for row in labels],
    }


# --- helpers


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for what datasets writes on the way, gone before the entry is complete."""
    work = folder / "work"
    work.mkdir()
    yield work
    shutil.rmtree(work)


def _map_options(work: Path, name: str, features: bool = True) -> dict[str, Any]:
    """Options with which Dataset.map writes here and nowhere else."""
    options = {"load_from_cache_file": False, "new_fingerprint": name, "cache_file_name": str(work / f"{name}.arrow")}
    return options | ({"features": _TOKENS, "batched": True, "batch_size": 100} if features else {})


def _kept(mapped: datasets.Dataset) -> tuple[datasets.Dataset, Drops]:
    """Return the rows without a problem, and the others counted by it."""
    drops: Drops = {}
    indices = []
    for index, (number, problem) in enumerate(zip(mapped["number"], mapped["problem"], strict=True)):
        if problem is None:
            indices.append(index)
        else:
            drop(drops, problem, number)
    return mapped.select(indices), drops


def _lengths(rows: datasets.Dataset) -> Iterator[pa.ChunkedArray]:
    return (pc.list_value_length(batch["input_ids"]) for batch in rows.with_format("arrow").iter(batch_size=1000))


def _count(rows: datasets.Dataset) -> dict[str, int]:
    """Tokens; targets: labels that are not masked; predicted: those that have a token before them in their row."""
    tokens = targets = first = 0
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        labels = batch["labels"].combine_chunks()
        tokens += len(labels.flatten())
        targets += pc.sum(pc.not_equal(labels.flatten(), IGNORED)).as_py()
        first += pc.sum(pc.not_equal(pc.list_element(labels, 0), IGNORED)).as_py()
    return {"tokens": tokens, "targets": targets, "predicted": targets - first}
