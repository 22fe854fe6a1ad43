"""The search space: keys, ranges, values, conditions, and the known points to try first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuner.errors import Problem
from tuner.spec.checks.fields import ends_or_values, not_a_field, searchable_fields, words_for, wrong_value
from tuner.spec.checks.words import any_of, nearest, show
from tuner.spec.fields import Field
from tuner.spec.hints import unknown_key
from tuner.spec.policy import FIXED_ONLY
from tuner.spec.space import Choice, Distribution, Int, LogUniform, Uniform, is_active
from tuner.spec.sweep import SweepSpec

SAME_THING = (
    ("lora.lora_alpha", "lora.alpha_ratio"),
    ("train.gradient_checkpointing", "train.activation_checkpointing"),
    ("train.gradient_checkpointing_kwargs", "train.activation_checkpointing_kwargs"),
)
"""Pairs of keys that say the same: a spec names one of them."""


def check_space(spec: SweepSpec) -> list[Problem]:
    """Find everything that is wrong with what is searched."""
    if not spec.space:
        return [Problem("space", "nothing", "at least one key to search")]
    found = []
    for key, distribution in spec.space.items():
        found += _check_key(spec, key, distribution) or [
            *_check_range(f"space.{key}", distribution),
            *_check_values(key, distribution),
        ]
        found += _check_conditions(spec, key, distribution)
    return found + _check_pairs(spec) + _check_enqueued(spec)


def _check_key(spec: SweepSpec, key: str, distribution: Distribution) -> list[Problem]:
    at = f"space.{key}"
    fields = searchable_fields()
    section, _, name = key.partition(".")
    if section not in ("train", "lora", "model") or not name or (section == "model" and key not in fields):
        by_name = {field.rpartition(".")[2]: field for field in fields}
        near = nearest(key, fields) or by_name.get(nearest(key, by_name) or "")
        allowed = "train.*, lora.*, model.dtype, model.quantization or model.attn_implementation"
        return [unknown_key(at, allowed, near, key)]
    if section != "model" and (problem := not_a_field(key, "a range", at)):
        return [problem]
    if key in FIXED_ONLY:
        return [Problem(at, "a range", f"a fixed value in {section}, {FIXED_ONLY[key]}")]
    if not fields[key].is_scalar:
        return [Problem(at, "a range", f"a fixed value in {section}, since it is {fields[key].allowed}")]
    if section == "lora" and spec.lora is None:
        return [Problem(at, "a range", "no lora.* key, since lora is null")]
    written = spec.model.model_fields_set if section == "model" else (spec.train if section == "train" else spec.lora)
    if name in (written or ()):
        return [Problem(at, f"a range, and {key} is fixed as well", f"either {key} or {at}")]
    return []


def _check_range(at: str, distribution: Distribution) -> list[Problem]:
    if isinstance(distribution, Choice):
        return _check_choices(at, distribution.values)
    low, high, step = distribution.low, distribution.high, distribution.step
    if low > high:
        return [Problem(f"{at}.low", show(low), f"a number below high, {show(high)}", show(high))]
    if low == high:
        return [Problem(at, f"one value, {show(low)}", "low below high; a single value is fixed in its section")]
    found = []
    if step is not None and step > high - low:
        found.append(Problem(f"{at}.step", show(step), f"at most high - low, {show(high - low)}"))
    if isinstance(distribution, Int) and distribution.log:
        if low < 1:
            found.append(Problem(f"{at}.low", show(low), "at least 1, since log is true"))
        if step != 1:
            found.append(Problem(f"{at}.step", show(step), "1, since log is true"))
    return found


def _check_choices(at: str, values: list[Any]) -> list[Problem]:
    found, seen = [], set()
    for index, value in enumerate(values):
        if _told_apart(value) in seen:
            found.append(Problem(f"{at}.values[{index}]", f"{show(value)} again", "each value once"))
        seen.add(_told_apart(value))
    return found


def _told_apart(value: Any) -> tuple[bool, Any]:
    """To compare by: to Python, true is 1."""
    return isinstance(value, bool), value


def _same(one: Any, other: Any) -> bool:
    return _told_apart(one) == _told_apart(other)


def _check_values(key: str, distribution: Distribution) -> list[Problem]:
    field = searchable_fields()[key]
    at = f"space.{key}"
    if isinstance(distribution, Choice):
        places = [(f"{at}.values[{index}]", value) for index, value in enumerate(distribution.values)]
    elif not field.is_number:
        return [Problem(f"{at}.type", distribution.type, f"choice, since {key} is {field.allowed}", "choice")]
    elif field.is_whole and not isinstance(distribution, Int):
        return [Problem(f"{at}.type", distribution.type, f"int or choice, since {key} is {_kind(field)}", "int")]
    else:
        places = [(f"{at}.low", distribution.low), (f"{at}.high", distribution.high)]
    return [problem for place, value in places if (problem := wrong_value(key, field, value, place))]


def _kind(field: Field) -> str:
    return field.allowed.removesuffix(" or null")


def _check_conditions(spec: SweepSpec, key: str, distribution: Distribution) -> list[Problem]:
    found = []
    for parent, values in (distribution.when or {}).items():
        at = f"space.{key}.when.{parent}"
        given = spec.space.get(parent)
        if given is None:
            found.append(
                Problem(at, "a key that is not searched", "a choice of the space", nearest(parent, spec.space))
            )
        elif not isinstance(given, Choice):
            found.append(Problem(at, f"a key of type {given.type}", "a choice of the space"))
        elif _reaches(spec, parent, key):
            found.append(Problem(at, "a circle of conditions", f"a key that does not depend on {key}"))
        elif not values:
            found.append(Problem(at, "[]", f"one or more of {words_for(given.values)}"))
        else:
            found += [
                Problem(at, show(value), words_for(given.values), nearest(value, [str(v) for v in given.values]))
                for value in values
                if not any(_same(value, other) for other in given.values)
            ]
    return found


def _reaches(spec: SweepSpec, start: str, goal: str) -> bool:
    """Whether the conditions of `start` lead to `goal`, directly or through others."""
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        key = ahead.pop()
        if key == goal:
            return True
        if key not in seen and key in spec.space:
            seen.add(key)
            ahead += spec.space[key].when or {}
    return False


def _check_pairs(spec: SweepSpec) -> list[Problem]:
    named = {*spec.space, *(f"train.{name}" for name in spec.train), *(f"lora.{name}" for name in spec.lora or {})}
    return [
        Problem(f"space.{second}" if second in spec.space else second, f"{second} beside {first}", "one of the two")
        for first, second in SAME_THING
        if first in named and second in named
    ]


def _check_enqueued(spec: SweepSpec) -> list[Problem]:
    found = []
    points = spec.search.enqueue
    if len(points) > spec.budget.trials:
        found.append(Problem("search.enqueue", f"{len(points)} points", f"at most budget.trials, {spec.budget.trials}"))
    for index, point in enumerate(points):
        found += check_point(spec.space, point, f"search.enqueue[{index}].")
    return found


def check_point(space: Mapping[str, Distribution], point: Mapping[str, Any], at: str = "") -> list[Problem]:
    """Find everything that is wrong with values to try; keys that it lacks are the sampler's to fill in."""
    found = []
    for key, value in point.items():
        distribution = space.get(key)
        if distribution is None:
            found.append(Problem(f"{at}{key}", "a key that is not searched", any_of(space), nearest(key, space)))
        elif not _contains(distribution, value):
            found.append(Problem(f"{at}{key}", show(value), _domain(distribution)))
        elif not is_active(distribution, point):
            needs = " and ".join(f"{parent} {words_for(values)}" for parent, values in distribution.when.items())  # type: ignore[union-attr]
            found.append(Problem(f"{at}{key}", show(value), f"this key only in a point with {needs}"))
    return found


def _contains(distribution: Distribution, value: Any) -> bool:
    if isinstance(distribution, Choice):
        return any(_same(value, other) for other in distribution.values)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if not distribution.low <= value <= distribution.high:
        return False
    if isinstance(distribution, Int):
        return isinstance(value, int) and (value - distribution.low) % distribution.step == 0
    if isinstance(distribution, Uniform) and distribution.step is not None:
        steps = (value - distribution.low) / distribution.step
        return math.isclose(steps, round(steps), abs_tol=1e-6)
    return True


def _domain(distribution: Distribution) -> str:
    if isinstance(distribution, Choice):
        return words_for(distribution.values)
    low, high = ends_or_values(distribution)
    stepped = not isinstance(distribution, LogUniform) and distribution.step not in (None, 1)
    kind = "a whole number" if isinstance(distribution, Int) else "a number"
    return f"{kind} from {show(low)} to {show(high)}" + (f" in steps of {show(distribution.step)}" if stepped else "")
