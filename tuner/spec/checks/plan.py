"""Budget, sampler, early stopping and objective: whether they can work together."""

from __future__ import annotations

import math

from tuner.errors import Problem
from tuner.spec.checks.words import show
from tuner.spec.layout import is_object_store
from tuner.spec.space import Choice, Distribution, Int, Uniform
from tuner.spec.sweep import GOAL_OF_METRIC, SweepSpec

MAX_GRID = 100_000
BUDGETS = ("tokens_per_trial", "steps_per_trial", "epochs_per_trial")
MODELLING_SAMPLERS = ("tpe", "gp", "cmaes")
"""Samplers that learn from results once the startup trials are over."""


def check_plan(spec: SweepSpec) -> list[Problem]:
    """Find every budget, sampler, stopping rule or objective that cannot do its work."""
    return [*_check_budget(spec), *_check_sampler(spec), *_check_stopping(spec), *_check_objective(spec)]


def _check_budget(spec: SweepSpec) -> list[Problem]:
    budget = spec.budget
    given = {name: getattr(budget, name) for name in BUDGETS if getattr(budget, name) is not None}
    if len(given) != 1:
        return [
            Problem("budget", " and ".join(given) or "no length of a trial", f"exactly one of {', '.join(BUDGETS)}")
        ]
    name, amount = next(iter(given.items()))
    if name != "epochs_per_trial" and budget.evals_per_trial > amount:
        return [Problem("budget.evals_per_trial", show(budget.evals_per_trial), f"at most {name}, {amount}")]
    found = []
    if budget.tokens is not None and budget.tokens_per_trial and budget.tokens < budget.tokens_per_trial:
        allowed = f"at least budget.tokens_per_trial, {budget.tokens_per_trial}, or no trial completes"
        found.append(Problem("budget.tokens", show(budget.tokens), allowed))
    if budget.disk is not None and is_object_store(spec.storage.root):
        found.append(Problem("budget.disk", show(budget.disk), "null, since storage.root is an object store"))
    return found


def _check_sampler(spec: SweepSpec) -> list[Problem]:
    search, trials = spec.search, spec.budget.trials
    found = []
    if search.sampler in MODELLING_SAMPLERS and 1 < trials <= search.startup_trials:
        allowed = f"below budget.trials, {trials}, or {search.sampler} never models a result"
        found.append(Problem("search.startup_trials", show(search.startup_trials), allowed))
    if search.sampler == "cmaes" and all(isinstance(distribution, Choice) for distribution in spec.space.values()):
        allowed = "another sampler, or a key of type int, uniform or log_uniform"
        found.append(Problem("search.sampler", "'cmaes' and only choices", allowed, "tpe"))
    if search.sampler == "grid":
        found += _check_grid(spec)
    return found


def _check_grid(spec: SweepSpec) -> list[Problem]:
    found = []
    sizes = {key: grid_size(distribution) for key, distribution in spec.space.items()}
    for key, distribution in spec.space.items():
        if sizes[key] is None:
            allowed = "choice, int or a stepped uniform, since search.sampler is grid"
            found.append(Problem(f"space.{key}.type", distribution.type, allowed))
        if distribution.when:
            found.append(Problem(f"space.{key}.when", show(distribution.when), "no condition, search.sampler is grid"))
    if not found:
        points = math.prod(size for size in sizes.values() if size)
        if points > MAX_GRID:
            found.append(Problem("space", f"{points} points", f"at most {MAX_GRID}, since search.sampler is grid"))
        elif spec.budget.trials > points:
            found.append(
                Problem("budget.trials", show(spec.budget.trials), f"at most {points}, the points of the grid")
            )
    return found


def grid_size(distribution: Distribution) -> int | None:
    """Return how many values a grid has along one key, or None where there is no end of them."""
    if isinstance(distribution, Choice):
        return len(distribution.values)
    if isinstance(distribution, Int):
        return (distribution.high - distribution.low) // distribution.step + 1
    if isinstance(distribution, Uniform) and distribution.step is not None:
        steps = (distribution.high - distribution.low) / distribution.step
        return math.floor(steps + 1e-9) + 1 if 0 <= steps < MAX_GRID else None
    return None


def _check_stopping(spec: SweepSpec) -> list[Problem]:
    stopping, evals = spec.stopping, spec.budget.evals_per_trial
    found = []
    if stopping.type != "none" and evals == 1:
        allowed = "none, since budget.evals_per_trial is 1 and a trial ends at its only evaluation"
        found.append(Problem("stopping.type", show(stopping.type), allowed, "none"))
    elif stopping.type != "none" and stopping.grace_evals >= evals:
        allowed = f"1 to {evals - 1}, below budget.evals_per_trial, or {stopping.type} never stops a trial"
        found.append(Problem("stopping.grace_evals", show(stopping.grace_evals), allowed))
    if stopping.patience is not None and stopping.patience >= evals - 1:
        allowed = f"at least 2 below budget.evals_per_trial, {evals}, or it ends no trial before its last evaluation"
        found.append(Problem("stopping.patience", show(stopping.patience), allowed))
    if stopping.patience is None and stopping.min_delta:
        found.append(Problem("stopping.min_delta", show(stopping.min_delta), "0, or stopping.patience beside it"))
    return found


def _check_objective(spec: SweepSpec) -> list[Problem]:
    objective = spec.objective
    goal = GOAL_OF_METRIC[objective.metric]
    if objective.goal == goal:
        return []
    return [Problem("objective.goal", show(objective.goal), f"{goal}, since the metric is {objective.metric}", goal)]
