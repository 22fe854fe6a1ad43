"""Everything that is wrong in a spec, all at once, before a GPU is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.base import check_base
from tuner.spec.checks.batch import check_batch
from tuner.spec.checks.clashes import check_clashes
from tuner.spec.checks.data import check_data
from tuner.spec.checks.fields import check_fields
from tuner.spec.checks.needs import check_foreign_code, check_needs
from tuner.spec.checks.paths import check_paths, check_storage, make_absolute
from tuner.spec.checks.plan import check_plan
from tuner.spec.checks.shape import check_shape
from tuner.spec.checks.space import check_space
from tuner.spec.checks.strategies import check_strategy
from tuner.spec.checks.unread import check_unread
from tuner.spec.checks.words import show
from tuner.spec.defaults import fill_defaults
from tuner.spec.sweep import SweepSpec


def check_values(
    values: Any, base: Path, root: str | None = None, elsewhere: bool = False
) -> tuple[SweepSpec | None, list[Problem]]:
    """Hold the values of a spec against everything known; `base` is the folder that its paths start from.

    Returns the resolved spec and no problems, or None and every problem. With `elsewhere` it will run on another
    machine: what must be there is looked for there, not here.
    """
    if not isinstance(values, Mapping):
        return None, [Problem("the spec", show(values), "sections, such as name, model, data, space and budget")]
    spec, problems = check_shape(fill_defaults(values))
    if spec is not None:
        spec = make_absolute(spec, base, root)
        told = [problem.key for problem in problems]
        checks = [check for check in CHECKS if not (elsewhere and check in OF_THIS_MACHINE)]
        found = [problem for check in checks for problem in check(spec)]
        found = [problem for problem in found if not problem.key.endswith(_left_out(values, spec))]
        problems += [problem for problem in found if not any(_touch(problem.key, key) for key in told)]
    if problems:
        return None, sorted(problems, key=_section)
    return spec, []


CHECKS = (
    check_paths,
    check_base,
    check_storage,
    check_data,
    check_fields,
    check_space,
    check_plan,
    check_batch,
    check_clashes,
    check_strategy,
    check_needs,
    check_foreign_code,
    check_unread,
)
"""Each takes a spec of the right shape and returns what is wrong with it."""
OF_THIS_MACHINE = (check_paths, check_base, check_batch, check_needs)


def _left_out(values: Mapping[str, Any], spec: SweepSpec) -> tuple[str, ...]:
    """Ends of the keys that look at a searched key which had to be left out: conditions and enqueued points."""
    space = values.get("space")
    return tuple(f".{key}" for key in space if key not in spec.space) if isinstance(space, Mapping) else ()


def _touch(key: str, told: str) -> bool:
    """Whether one key lies within the other: the second problem is then likely a consequence of the first."""
    return key == told or key.startswith((f"{told}.", f"{told}[")) or told.startswith((f"{key}.", f"{key}["))


def _section(problem: Problem) -> int:
    sections = list(SweepSpec.model_fields)
    section = problem.key.split(".")[0].split("[")[0]
    return sections.index(section) if section in sections else -1
