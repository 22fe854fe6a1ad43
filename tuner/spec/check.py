"""Everything that is wrong in a spec, all at once, before a GPU is touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.paths import check_paths, make_absolute
from tuner.spec.checks.shape import check_shape
from tuner.spec.checks.words import show
from tuner.spec.sweep import GOAL_OF_METRIC, SweepSpec


def check_values(values: Any, base: Path, root: Path | None = None) -> tuple[SweepSpec | None, list[Problem]]:
    """Hold the values of a spec against everything known; `base` is the folder that its paths start from.

    Returns the resolved spec and no problems, or None and every problem.
    """
    if not isinstance(values, Mapping):
        return None, [Problem("the spec", show(values), "sections, such as name, model, data, space and budget")]
    spec, problems = check_shape(_with_goal(values))
    if spec is not None:
        spec = make_absolute(spec, base, root)
        told = [problem.key for problem in problems]
        for problem in _beyond_shape(spec):
            if not any(_touch(problem.key, key) for key in told):
                problems.append(problem)
    if problems:
        return None, sorted(problems, key=_section)
    return spec, []


def _beyond_shape(spec: SweepSpec) -> list[Problem]:
    return [*check_paths(spec)]


def _with_goal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with objective.goal following the metric where it is not written."""
    filled = copy.deepcopy(dict(values))
    objective = filled.get("objective")
    if isinstance(objective, dict) and (metric := objective.get("metric")) in list(GOAL_OF_METRIC):
        objective.setdefault("goal", GOAL_OF_METRIC[metric])
    return filled


def _touch(key: str, told: str) -> bool:
    """Whether one key lies within the other: the second problem is then likely a consequence of the first."""
    return key == told or key.startswith(f"{told}.") or told.startswith(f"{key}.")


def _section(problem: Problem) -> int:
    sections = list(SweepSpec.model_fields)
    section = problem.key.split(".")[0].split("[")[0]
    return sections.index(section) if section in sections else -1
