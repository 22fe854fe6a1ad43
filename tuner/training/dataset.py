"""Prepare a data set once for all trials that train on it alike: split, tokenised, truncated, packed.

Three stages, each a folder below `cache/data` named by a hash of all it depends on: `rows` (what is trained on and what
is held out), `tokens` (both, as token ids and labels), then `train` (truncated or packed for one kind of trial) and
`eval` (the one evaluation set of the sweep). What comes out is what a stock SFTTrainer would have made of the same
rows, so it takes them with `dataset_kwargs={"skip_prepare_dataset": True}`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets

from tuner.training.cache import make_once
from tuner.training.prompting import SAMPLE_ROWS, prompting_of
from tuner.training.split import Progress, build_rows, rows_key
from tuner.training.stages import build_eval, build_tokens, build_train
from tuner.training.tokens import configure_tokenizer, masking, tokenizer_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.spec.sweep import SweepSpec

DEFAULT_MAX_LENGTH = 1024  # of trl.SFTConfig
DEFAULT_SEED = 42  # of transformers.TrainingArguments
_RECIPE = {"recipe": 2, **{name: version(name) for name in ("trl", "transformers", "datasets")}}


@dataclass(frozen=True)
class Prepared:
    """Data that a trial can train on as it is."""

    train: Path
    """Folder saved by datasets: input_ids, labels, and seq_lengths where sequences are packed."""
    eval: Path
    """Folder saved by datasets: input_ids, labels; unpacked, truncated alike for every trial of a sweep."""
    summary: dict[str, Any]
    """Format, counts of rows and tokens, what was dropped and why, fingerprints, `prompting_of`; fit for JSON."""


def prepare(
    data: Mapping[str, Any],
    train: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    eval_max_length: int | None,
    progress: Progress | None = None,
) -> Prepared:
    """Return the data of one trial, made now or found in the cache.

    `data` is `DataSpec.model_dump()` and `train` the train section of a `TrialConfig`; `tokenizer` is a copy of the
    base model's own, and takes on what `train` says of it, as a trainer's would. The evaluation set depends on `train`
    only through what decides the targets: chat template, eos token, loss masks, truncation_mode. Safe to call from
    several processes at once. Raises `DataError`.
    """
    report = progress or (lambda stage, done, total: None)
    configure_tokenizer(tokenizer, train)
    text_field = train.get("dataset_text_field", "text")
    with _quiet():
        key = {**_RECIPE, **rows_key(data, text_field)}
        rows = _entry(cache, "rows", key)
        found = make_once(rows, lambda folder: build_rows(data, text_field, folder, report))

        examples = [json.loads(row) for row in datasets.load_from_disk(str(rows / "train"))[:SAMPLE_ROWS]["row"]]
        sample = examples[0]
        rules = masking(tokenizer, train, found["format"], sample)
        key = {**_RECIPE, "rows": rows.name, **tokenizer_key(tokenizer, rules)}
        tokens = _entry(cache, "tokens", key)
        num_proc = train.get("dataset_num_proc")
        tokenized = make_once(tokens, lambda folder: build_tokens(rows, tokenizer, rules, num_proc, folder, report))

        packing = _packing_key(train)
        train_folder = _entry(cache, "train", {**_RECIPE, "tokens": tokens.name, **packing})
        trained = make_once(train_folder, lambda folder: build_train(tokens / "train", packing, folder, report))

        mode = train.get("truncation_mode", "keep_start")
        key = {**_RECIPE, "tokens": tokens.name, "max_length": eval_max_length, "truncation_mode": mode}
        eval_folder = _entry(cache, "eval", key)
        evaluated = make_once(eval_folder, lambda folder: build_eval(tokens / "eval", eval_max_length, mode, folder))
    summary = _summarise(found, tokenized, trained, evaluated)
    summary["prompting"] = prompting_of(data, found["format"], examples)
    return Prepared(train_folder / "rows", eval_folder / "rows", summary)


def eval_max_length(spec: SweepSpec) -> int | None:
    """Return the largest max_length that any trial of the space can have; None when one can have no limit."""
    fixed = spec.train.get("max_length", DEFAULT_MAX_LENGTH)
    searched = spec.space.get("train.max_length")
    if searched is None:
        return fixed
    lengths = cast("list[int | None]", list(searched.values) if searched.type == "choice" else [int(searched.high)])
    if searched.when:
        lengths.append(fixed)
    limits = [length for length in lengths if length is not None]
    return max(limits) if limits == lengths else None


def _entry(cache: Path, stage: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache / "data" / f"{stage}-{digest[:20]}"


def _packing_key(train: Mapping[str, Any]) -> dict[str, Any]:
    key = {
        "packing": train.get("packing", "none"),
        "max_length": train.get("max_length", DEFAULT_MAX_LENGTH),
        "truncation_mode": train.get("truncation_mode", "keep_start"),
    }
    return key | ({"seed": train.get("seed", DEFAULT_SEED)} if train.get("shuffle_dataset") else {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars of datasets' own: whoever wants progress is told through the callback."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _summarise(
    rows: dict[str, Any], tokens: dict[str, Any], train: dict[str, Any], held_out: dict[str, Any]
) -> dict[str, Any]:
    own_file = {key.removeprefix("eval_"): value for key, value in rows.items() if key.startswith("eval_")}
    eval_file = {f"eval_{key}": own_file[key] for key in ("format", "rows_read") if key in own_file}
    return {
        "format": rows["format"],
        "columns_unused": rows["columns_unused"],
        "rows_read": rows["rows_read"],
        **eval_file,
        "rows_train": train["rows"],
        "rows_eval": held_out["rows"],
        "duplicates_removed": rows["duplicates_removed"],
        "dropped": rows["dropped"] | tokens["dropped"] | train["dropped"],
        "eval_dropped": own_file.get("dropped", {}) | tokens["eval_dropped"] | held_out["dropped"],
        "truncated": train["truncated"],
        "eval_truncated": held_out["truncated"],
        "sequences": train["sequences"],
        "train_tokens": train["tokens"],
        "target_tokens": train["targets"],
        "eval_tokens": held_out["predicted"],
        "fingerprints": {"data": rows["fingerprint"], "eval": held_out["fingerprint"]},
    }
