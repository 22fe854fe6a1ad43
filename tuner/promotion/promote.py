"""Promotion: the best trial's checkpoint becomes a verified, versioned model under an alias, or the alias stays."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from tuner.errors import Problem, PromotionRefused, SpecError, TunerError
from tuner.promotion.card import write_card
from tuner.promotion.fresh import MergeJob, Progress, run_fresh
from tuner.promotion.gate import decide
from tuner.promotion.manifest import public_fields, public_spec, write_manifest
from tuner.promotion.registry import Version, current, next_version, publish, staging
from tuner.spec.layout import Root, SweepFolder, refuse_full_disk
from tuner.spec.sweep import GOAL_OF_METRIC, PromotionSpec, SweepSpec
from tuner.spec.trial import Report
from tuner.training.hub import refuse_silent_hub

SAMPLES = 2


class Scores(TypedDict):
    """Figures of everything the gate looks at, by metric."""

    baseline: dict[str, float]
    trial: dict[str, float]
    merged: dict[str, float]
    incumbent: dict[str, float] | None


class Trial(Protocol):
    """What promotion needs to know of a `TrialRecord`."""

    @property
    def number(self) -> int: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Promotion:
    """A promotion that took place. All scores are `metric` on the sweep's evaluation set."""

    alias: str
    version: str
    path: Path | str
    """Of its folder; its URL where the storage root is an object store."""
    trial: int
    metric: str
    score_before: float
    """The trial's own: the adapter on its base."""
    score_after: float
    """The merged model's, loaded from what was saved."""
    baseline: float
    """The untuned base's."""
    incumbent: float | None
    """That of the model the alias pointed at before; None: it pointed at none, or the two cannot be compared."""
    forced: bool
    """Whether the gate had said no."""
    reasons: tuple[str, ...]
    """What the gate had said."""
    samples: tuple[dict[str, str], ...]
    """`prompt`, `before` (the base's answer) and `after` (the merged model's)."""
    scores: Scores
    """Of the same four, by metric: all that were measured."""
    pushed_to: str | None = None
    """Address of the model on the hub."""


def promote(
    spec: SweepSpec,
    record: Trial,
    report: Report,
    baseline: Mapping[str, Any],
    *,
    base: Mapping[str, str],
    eval_fingerprint: str,
    data_fingerprint: str,
    prompting: Mapping[str, Any] | None,
    sweep_folder: SweepFolder,
    alias: str | None = None,
    force: bool = False,
    push_to_hub: str | None = None,
    progress: Progress = lambda step: None,
    may_move: Callable[[], None] = lambda: None,
) -> Promotion:
    """Merge, measure and, if the gate agrees, publish the checkpoint of `report` as the alias's next version.

    Args:
        report: the evaluation to promote: its tokens and scores.
        baseline: scores of the untuned base, by metric.
        base: what `identify` said of it when the sweep began; another one is refused.
        eval_fingerprint: of the sweep's evaluation set, which is held against it first; a promoted model measured on
            other rows is measured again on these.
        prompting: what the preparation of the sweep found of its prompts, for the model card.
        alias: instead of the spec's.
        force: promote although the gate says no, and record that. A checkpoint that is broken, or a score that is not
            finite, cannot be forced.
        push_to_hub: repository that the version's folder is uploaded to; made, private, where there is none.
        progress: called with a line at the start of every step.
        may_move: called before the alias moves; raises where whoever asked may decide that no longer.

    Raises:
        PromotionRefused: the checkpoint or the evaluation set is broken, or the gate said no; nothing is left behind.
        SpecError: `push_to_hub` can be no repository's name.
        AliasMoved: another node promoted meanwhile, and this model was not measured against that one.
        DiskFullError: there is too little room for the merged model.
        TunerError: the merge process failed; its last lines are in the message.
    """
    if push_to_hub:
        _check_repository(push_to_hub)
    settings = spec.promotion or PromotionSpec()
    alias = alias or settings.alias
    root = Root.of(spec)
    checkpoint = _checkpoint(sweep_folder, record, report)
    root.inside(sweep_folder.eval_rows)  # refused here where it is a link that leads out
    base_figures, trial_figures = _figures(baseline, "untuned base"), _figures(report.as_dict(), "trial")
    refuse_full_disk(root.models)
    with staging(root, alias, progress) as working:
        before = current(root, alias)
        known = _known_scores(before, eval_fingerprint)
        job = MergeJob(
            config=dict(record.config),
            spec=public_spec(spec),
            eval_fingerprint=eval_fingerprint,
            prompting=dict(prompting) if prompting else None,
            checkpoint=checkpoint,
            output=str(working / "model"),
            cache=str(root.cache),
            merge_into=settings.merge_into,
            eval_batch_size=record.config["train"].get("per_device_eval_batch_size", 8),
            metric=spec.objective.metric,
            goal=spec.objective.goal,
            trial_score=trial_figures[spec.objective.metric],
            max_regression=settings.max_regression,
            base=dict(base),
            incumbent=str(root.fetch(before.path)) if before is not None and known is None else None,
            samples=SAMPLES,
            parent=os.getpid(),
        )
        try:
            outcome = run_fresh(job, working, sweep_folder.promotion_log, progress)
        finally:
            with suppress(FileNotFoundError):
                root.keep(sweep_folder.promotion_log, stays=True)
        scores = Scores(
            baseline=base_figures,
            trial=trial_figures,
            merged=_figures(outcome["merged"], "merged model"),
            incumbent=known or (_figures(outcome["incumbent"], "promoted model") if outcome["incumbent"] else None),
        )
        reasons = _reasons(spec, settings, scores, outcome["reasons"], force)
        version = next_version(root, alias)
        manifest = {
            **_origin(spec, record, report),
            **{key: outcome[key] for key in ("base", "prompting", "dtype", "checkpoint")},
            "alias": alias,
            "version": version.name,
            "previous": before.name if before is not None else None,
            "data_fingerprint": data_fingerprint,
            "eval_fingerprint": eval_fingerprint,
            "scores": scores,
            "forced": bool(reasons),
            "reasons": reasons,
        }
        write_manifest(working / "model", manifest)
        write_card(working / "model", manifest, outcome["samples"])
        may_move()
        publish(version, before, working / "model", forced=bool(reasons), reasons=tuple(reasons))
    pushed_to = _push(version, push_to_hub, progress) if push_to_hub else None
    return _promotion(version, manifest, spec.objective.metric, outcome["samples"], pushed_to)


def _checkpoint(sweep: SweepFolder, record: Trial, report: Report) -> str:
    """The folder of a trial's adapter: where this sweep keeps it, whatever the record calls it."""
    if report.adapter_path is None:
        raise PromotionRefused([f"the adapter of trial {record.number} was not kept, see storage.keep_best"])
    adapter = sweep.adapter(record.number, report.tokens)
    try:
        return str(sweep.root.fetch(adapter))
    except FileNotFoundError:
        said = f"trial {record.number} has no checkpoint at {sweep.root.address(adapter)}"
        raise PromotionRefused([said], broken=True) from None


def _known_scores(version: Version | None, eval_fingerprint: str) -> dict[str, float] | None:
    """What the promoted model scored when it was promoted, if that was on the same evaluation set."""
    if version is None:
        return None
    merged: dict[str, float] = version.recorded("scores", "merged")
    return merged if version.recorded("eval_fingerprint") == eval_fingerprint else None


def _figures(values: Mapping[str, Any], whose: str) -> dict[str, float]:
    """The metrics among `values`; one that is missing or not finite is refused here, so that force never sees it."""
    figures = {metric: values.get(metric) for metric in GOAL_OF_METRIC}
    finite = {metric: value for metric, value in figures.items() if value is not None and math.isfinite(value)}
    if finite != figures:
        raise PromotionRefused([f"{metric} of the {whose} is {figures[metric]}" for metric in figures.keys() - finite])
    return finite


def _reasons(spec: SweepSpec, settings: PromotionSpec, scores: Scores, reasons: list[str], force: bool) -> list[str]:
    """What speaks against promoting, besides `reasons`; returns only when nothing does, or when it is forced."""
    metric, incumbent = spec.objective.metric, scores["incumbent"]
    reasons = reasons + decide(
        metric,
        spec.objective.goal,
        scores["trial"][metric],
        scores["merged"][metric],
        scores["baseline"][metric],
        incumbent[metric] if incumbent is not None else None,
        settings.max_regression,
    )
    if reasons and not force:
        raise PromotionRefused(reasons)
    return reasons


def _origin(spec: SweepSpec, record: Trial, report: Report) -> dict[str, Any]:
    """The part of the manifest that says where the model comes from."""
    return {
        "sweep": spec.name,
        "trial": record.number,
        "config": {**record.config, "train": public_fields(record.config["train"])},
        "tokens": report.tokens,
        "step": report.step,
        "spec": public_spec(spec),
    }


def _promotion(
    version: Version, manifest: dict[str, Any], metric: str, samples: list[dict[str, str]], pushed_to: str | None
) -> Promotion:
    scores = manifest["scores"]
    return Promotion(
        alias=version.alias,
        version=version.name,
        path=version.place,
        trial=manifest["trial"],
        metric=metric,
        score_before=scores["trial"][metric],
        score_after=scores["merged"][metric],
        baseline=scores["baseline"][metric],
        incumbent=scores["incumbent"][metric] if scores["incumbent"] is not None else None,
        forced=manifest["forced"],
        reasons=tuple(manifest["reasons"]),
        samples=tuple(samples),
        scores=scores,
        pushed_to=pushed_to,
    )


def _check_repository(repository: str) -> None:
    """Raise SpecError for what can be no repository's name, before hours of work are put into it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError:
        allowed = "NAME or USER/NAME; letters, digits, -, _ and ., at most 96"
        raise SpecError([Problem("push_to_hub", repr(repository), allowed)], "promote") from None


def _push(version: Version, repository: str, progress: Progress) -> str:
    """Upload a version's folder as it is; the repository is made private where there is none.

    Raises TunerError where the hub refuses or is out of reach: the version is promoted all the same.
    """
    from huggingface_hub import HfApi

    progress(f"uploading to {repository}")
    api = HfApi()
    title = f"{version.alias} {version.name}"
    folder = version.root.fetch(version.path)
    try:
        refuse_silent_hub()
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=title))
    except Exception as error:  # the hub's client has one for each of its ways to fail, and its HTTP client others
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TunerError(f"{title} is promoted, but it was not uploaded to {repository}: {said}") from error
