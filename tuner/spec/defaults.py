"""Defaults that follow other values, filled in where the spec is silent: what is written is never overruled."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tuner.spec.policy import HARMLESS
from tuner.spec.sweep import GOAL_OF_METRIC, SearchSpec, StoppingSpec


def fill_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with three defaults that follow others, and without fields that change nothing (HARMLESS).

    `objective.goal` follows the metric. `search.startup_trials` is at most half the trials, or the sampler would never
    model a result. `stopping.grace_evals` is below `budget.evals_per_trial`, or nothing would ever be stopped; with a
    single evaluation there is no early stopping.
    """
    filled = copy.deepcopy(dict(values))
    train, objective, budget = filled.get("train"), filled.get("objective"), filled.get("budget")
    if isinstance(train, dict):
        filled["train"] = {
            name: value for name, value in train.items() if value not in HARMLESS.get(f"train.{name}", ())
        }
    if isinstance(objective, dict) and (metric := objective.get("metric")) in list(GOAL_OF_METRIC):
        objective.setdefault("goal", GOAL_OF_METRIC[metric])
    if not isinstance(budget, dict):
        return filled
    trials, evals = budget.get("trials"), budget.get("evals_per_trial")
    search, stopping = filled.setdefault("search", {}), filled.setdefault("stopping", {})
    if type(trials) is int and isinstance(search, dict):
        search.setdefault("startup_trials", min(SearchSpec().startup_trials, max(trials // 2, 0)))
    if type(evals) is int and evals > 0 and isinstance(stopping, dict):
        if evals == 1:
            stopping.setdefault("type", "none")
        stopping.setdefault("grace_evals", min(StoppingSpec().grace_evals, max(evals - 1, 1)))
    return filled
