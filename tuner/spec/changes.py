"""What differs between two specs, and what a sweep that has begun may still be given: more of its budget."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.errors import Problem, SpecError
from tuner.spec.check import check_values
from tuner.spec.checks.words import any_of, show
from tuner.spec.load import apply_overrides, dump_spec
from tuner.spec.sweep import SweepSpec
from tuner.spec.text import parse_yaml

MAY_GROW = tuple(f"budget.{name}" for name in ("trials", "time_limit", "tokens", "gpu_hours", "disk", "max_failures"))
"""The budgets of a whole sweep. They change no trial, so those before and after can be compared."""


def differences(before: SweepSpec, after: SweepSpec) -> dict[str, tuple[Any, Any]]:
    """Every dotted key whose value is another, with both."""
    old, new = (dict(_flat(spec.model_dump(mode="json"))) for spec in (before, after))
    keys = dict.fromkeys([*old, *new])
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}  # empty on one side
    return {key: (old.get(key), new.get(key)) for key in keys if key not in sections and old.get(key) != new.get(key)}


def with_more_budget(spec: SweepSpec, overrides: Sequence[str]) -> SweepSpec:
    """The spec of a sweep that may spend more; null is no limit. Raises SpecError for any other change."""
    if not overrides:
        return spec
    values = apply_overrides(parse_yaml(dump_spec(spec)), overrides)
    # The sweep has found its files, be they here or elsewhere.
    changed, problems = check_values(values, Path(os.sep), spec.storage.root, elsewhere=True)
    if changed is None:
        raise SpecError(problems, "--set")
    problems = [
        Problem(key, show(new), f"{show(old)}, as the sweep began: only {any_of(MAY_GROW)} may grow")
        for key, (old, new) in differences(spec, changed).items()
        if key not in MAY_GROW or old is None or (new is not None and new < old)
    ]
    if problems:
        raise SpecError(problems, "--set")
    return changed


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
