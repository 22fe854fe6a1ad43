"""What a sweep needs before its first trial: the data, the budget in tokens, and the untuned base's own score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, load_from_disk
from filelock import FileLock

from tuner.errors import DataError, Problem, SpecError, TunerError
from tuner.spec.batch import batch_of_one
from tuner.spec.layout import Root, SweepFolder
from tuner.spec.sweep import SweepSpec
from tuner.training.dataset import Prepared, eval_max_length, prepare
from tuner.training.eval_set import damage_of, keep_eval_set
from tuner.training.evaluation import Score, refuse_other_head, score
from tuner.training.identity import changes_of_base, identify
from tuner.training.model import load_model, load_tokenizer
from tuner.training.structure import refuse_other_rows, refuse_other_structure, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Preparation:
    """The facts every trial of the sweep shares."""

    tokens_per_trial: int
    data: dict[str, Any]
    """`Prepared.summary`, and as `base` what `identify` says of it."""
    baseline: dict[str, float]
    """`eval_loss` and `mean_token_accuracy` of the base before any training."""
    lanes: int = 1
    """How many lanes an engine divides its threads among; found after all the others."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Measure = Callable[[Preparation], Score | None]
"""Scores the untuned base on the evaluation set of a sweep whose `baseline` is still empty; None leaves it so."""


def prepare_rows(
    spec: SweepSpec, train: dict[str, Any], tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Prepared:
    """The rows a trial with these `train` settings learns from and is scored on; made once, then found in the cache.

    The tokenizer, as `load_tokenizer` returns it, is the trial's own afterwards: with its chat template and tokens.
    """
    cache = Root.of(spec).cache
    return prepare(spec.data.model_dump(), train, tokenizer, cache, eval_max_length(spec), progress)


def prepare_sweep(
    spec: SweepSpec, progress: Progress, known: Preparation | None = None, measure: Measure | None = None
) -> Preparation:
    """Tokenise, convert the budget to tokens, and score the base. The sweep keeps its own copy of the eval set.

    Of a sweep that goes on, `known` is what was found at its start; it is returned if data and base are still the same.
    Without `measure` the base is loaded for this alone.
    """
    root = Root.of(spec)
    progress("Loading the tokenizer", 0, 0)
    model = spec.model.model_dump()
    tokenizer = load_tokenizer(model, root.cache)
    if known is not None:
        prepared = prepare_rows(spec, spec.train, tokenizer, progress)
        refuse_changed_data(spec, prepared, known)
        if changes := changes_of_base(model, identify(model), known.data["base"]):
            raise TunerError(changes[0])
        whole_eval_set(spec, known.data["fingerprints"]["eval"])
        return known
    base = structure_of(spec, root.cache)
    refuse_other_structure(spec, base)
    prepared = prepare_rows(spec, spec.train, tokenizer, progress)
    refuse_other_rows(spec, base, (prepared.train, prepared.eval), tokenizer.pad_token_id)
    summary = prepared.summary | {"base": identify(model)}
    sweep = Preparation(tokens_per_trial(spec, summary), summary, {})
    keep_eval_set(SweepFolder.of(spec), prepared.eval)
    progress("Loading the base", 0, 0)
    result = measure(sweep) if measure else score_base(spec, load_base(spec), sweep)
    return replace(sweep, baseline=result.as_dict() if result else {})


def load_base(spec: SweepSpec) -> PreTrainedModel:
    """The base of a sweep, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(spec.model.model_dump(), Root.of(spec).cache, device)


def score_base(spec: SweepSpec, base: PreTrainedModel, sweep: Preparation) -> Score:
    """The untuned base's score on the sweep's evaluation set."""
    rows = eval_set(spec, sweep)
    refuse_other_head(base, rows)
    return score(base, rows, spec.train.get("per_device_eval_batch_size", 8))


def eval_set(spec: SweepSpec, sweep: Preparation) -> Dataset:
    """The rows of the sweep's evaluation set: `input_ids` and `labels`."""
    return load_from_disk(str(whole_eval_set(spec, sweep.data["fingerprints"]["eval"])))


def whole_eval_set(spec: SweepSpec, fingerprint: str) -> Path:
    """The folder, on this node, of the sweep's evaluation set, with the rows of this fingerprint.

    One that is gone or damaged is made again. Raises DataError where the data give these rows no more.
    """
    folder = SweepFolder.of(spec)
    if _damage_of_kept(folder, fingerprint) is None:
        return folder.eval_rows
    scratch = folder.root.cache / "data"
    scratch.mkdir(parents=True, exist_ok=True)
    with FileLock(scratch / f"eval-of-{folder.name}.lock"):
        damage = _damage_of_kept(folder, fingerprint)  # another process may have mended it
        if damage is not None:
            try:
                prepared = prepare_rows(spec, spec.train, load_tokenizer(spec.model.model_dump(), folder.root.cache))
                damage_of_data = damage_of(prepared.eval, fingerprint)
            except TunerError as error:
                damage_of_data = str(error)
            at = f"the evaluation set of sweep {spec.name!r}, {folder.root.address(folder.eval_rows)}"
            if damage_of_data is not None:
                raise DataError(f"{at}: {damage}; nor can it be made again from {spec.data.path}: {damage_of_data}")
            print(f"{at}: {damage}; it was made again from {spec.data.path}", flush=True)
            keep_eval_set(folder, prepared.eval)
    return folder.root.fetch(folder.eval_rows)


def _damage_of_kept(folder: SweepFolder, fingerprint: str) -> str | None:
    try:
        return damage_of(folder.root.fetch(folder.eval_rows), fingerprint)
    except FileNotFoundError:
        return "it is gone"


def refuse_changed_data(spec: SweepSpec, prepared: Prepared, sweep: Preparation) -> None:
    """Raise DataError when these are not the rows that the sweep began with."""
    if prepared.summary["fingerprints"] != sweep.data["fingerprints"]:
        raise DataError(f"{spec.data.path} has changed since the sweep began: its trials could not be compared")


def tokens_per_trial(spec: SweepSpec, summary: dict[str, Any]) -> int:
    """The budget of one trial in trained tokens, however the spec gives it.

    Steps are counted at the spec's own batch size (TRL's where it is searched), packing (none where it is searched) and
    mean sequence length, so that every trial of the sweep has the same budget. Raises SpecError when that leaves no
    token per evaluation.
    """
    budget = spec.budget
    if budget.tokens_per_trial is not None:
        tokens: float = budget.tokens_per_trial
    elif budget.epochs_per_trial is not None:
        tokens = budget.epochs_per_trial * summary["train_tokens"]
    else:
        assert budget.steps_per_trial is not None
        rows_per_step = math.prod(batch_of_one(spec.train))
        tokens = budget.steps_per_trial * rows_per_step * summary["train_tokens"] / summary["sequences"]
    if tokens < budget.evals_per_trial:
        raise SpecError(
            [Problem("budget", f"{tokens:.0f} tokens", f"at least {budget.evals_per_trial}, one per evaluation")]
        )
    return round(tokens)
