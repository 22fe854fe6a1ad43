"""The gate: whether a merged model may take an alias, from figures alone."""

from __future__ import annotations

import math
from typing import Literal

Goal = Literal["minimize", "maximize"]


def decide(
    metric: str,
    goal: Goal,
    trial_score: float,
    merged_score: float,
    baseline_score: float,
    incumbent_score: float | None,
    max_regression: float,
) -> list[str]:
    """Return the reasons against promoting, one sentence each; empty means promote.

    The merged model must be at most `max_regression` (relative: 0.01 is one per cent) worse than its own trial,
    strictly better than the untuned base, and strictly better than the model the alias points at (`None`: it points at
    none).
    All scores are `metric` on the same evaluation set. A figure that is not finite is a reason by itself.
    """
    figures = {"trial": trial_score, "merged model": merged_score, "base": baseline_score}
    if incumbent_score is not None:
        figures["promoted model"] = incumbent_score
    reasons = [f"{metric} of the {who} is {value}" for who, value in figures.items() if not math.isfinite(value)]
    if reasons:
        return reasons
    if lost_by_merging(merged_score, trial_score, goal) > max_regression:
        reasons.append(
            f"the merge made it worse: {metric} {merged_score:.4f} after, {trial_score:.4f} in the trial, "
            f"more than {max_regression:.2%} apart"
        )
    if not _better(merged_score, baseline_score, goal):
        reasons.append(f"not better than the base: {metric} {merged_score:.4f} against {baseline_score:.4f}")
    if incumbent_score is not None and not _better(merged_score, incumbent_score, goal):
        reasons.append(
            f"not better than what is promoted now: {metric} {merged_score:.4f} against {incumbent_score:.4f}"
        )
    return reasons


def lost_by_merging(merged_score: float, trial_score: float, goal: Goal) -> float:
    """How much worse the merged model scores than its trial, as a share of the trial's score; below 0: it is better."""
    lost = merged_score - trial_score if goal == "minimize" else trial_score - merged_score
    return lost / abs(trial_score) if trial_score else math.inf if lost > 0 else 0.0


def _better(score: float, other: float, goal: Goal) -> bool:
    return score < other if goal == "minimize" else score > other
