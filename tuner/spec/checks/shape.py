"""Pydantic's findings in plain words, and the spec without them, so that the other checks can go on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tuner.errors import Problem
from tuner.spec.checks.words import any_of, as_number, nearest, show
from tuner.spec.hints import UNKNOWN, unknown_key
from tuner.spec.space import Choice, Int, LogUniform, Uniform
from tuner.spec.sweep import NAME, SweepSpec

DISTRIBUTIONS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind for kind in (Choice, Int, Uniform, LogUniform)
}
STAND_INS: dict[str, Any] = {
    "name": "unnamed",
    "model": {"name": "unnamed"},
    "data": {"path": "unnamed"},
    "space": {},
    "budget": {"trials": 1},
}
"""What stands for a missing section while the rest is checked."""

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "list": "a list",
    "dict": "keys and values",
    "model": "keys and values",
    "finite": "a finite number",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_SCALARS = ("bool", "int", "float", "str", "none")


def check_shape(values: Mapping[str, Any]) -> tuple[SweepSpec | None, list[Problem]]:
    """Return the spec and no problems; or the problems, and the spec with the wrong parts left out, if that stands."""
    try:
        return SweepSpec.model_validate(values, strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems: dict[str, Problem] = {}
    for detail in details:
        problem = _in_words(detail)
        problems.setdefault(problem.key, problem)
    for problem in list(problems.values()):
        if problem.got == UNKNOWN and problem.nearest:
            problems.pop(f"{problem.key.rpartition('.')[0]}.{problem.nearest}".lstrip("."), None)
    try:
        return SweepSpec.model_validate(_without(values, details), strict=True), list(problems.values())
    except ValidationError:
        return None, list(problems.values())


def _path(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """An error's place as keys of the YAML: without the names that pydantic gives to members of unions."""
    if loc[0] == "space" and len(loc) > 2 and loc[2] in DISTRIBUTIONS:
        loc = loc[:2] + loc[3:]
    return loc[:-1] if _is_scalar_member(loc) else loc


def _is_scalar_member(loc: tuple[int | str, ...]) -> bool:
    return len(loc) > 2 and loc[-1] in _SCALARS and isinstance(loc[-2], int)


def _in_words(detail: ErrorDetails) -> Problem:
    path = _path(detail["loc"])
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    got, kind = detail["input"], detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        options = _keys_at(detail["loc"][:-1])
        return unknown_key(key, any_of(options), nearest(path[-1], options))
    if kind == "missing":
        return Problem(key, "nothing", "this key must be there")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        type_ = got.get("type") if isinstance(got, Mapping) else None
        return Problem(f"{key}.type", show(type_), any_of(DISTRIBUTIONS), nearest(type_, DISTRIBUTIONS))
    if kind == "literal_error":
        options = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        return Problem(key, show(got), any_of(options), nearest(got, options))
    if _is_scalar_member(detail["loc"]):
        return Problem(key, show(got), "true, false, a finite number, text or null")
    return Problem(key, show(got), _allowed(kind, context), _near_number(kind, got))


def _allowed(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "string_pattern_mismatch":
        return (
            "1 to 64 of A-Z a-z 0-9 . _ - and a letter or digit first" if NAME.pattern in context["pattern"] else "text"
        )
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"at least {context['min_length']} value"
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"{word} {context[name]:g}"
    return _TYPES.get(kind.split("_")[0], kind.replace("_", " "))


def _near_number(kind: str, got: Any) -> str | None:
    if kind.startswith(("int_", "float_")):
        return as_number(got, whole=kind.startswith("int"))
    return None


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the section that an unknown key stands in."""
    if len(loc) > 2 and loc[0] == "space":
        return list(DISTRIBUTIONS[str(loc[2])].model_fields)
    model: Any = SweepSpec
    for part in loc:
        annotation = model.model_fields[part].annotation
        model = next(kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return list(model.model_fields)


def _without(values: Mapping[str, Any], details: list[ErrorDetails]) -> dict[str, Any]:
    """The spec with every wrong value left out, so that its default stands there instead."""
    mended = copy.deepcopy(dict(values))
    for detail in details:
        section, *rest = _path(detail["loc"])
        if detail["type"] == "missing" and not rest:
            mended[str(section)] = copy.deepcopy(STAND_INS[str(section)])
            continue
        inner = mended.get(str(section))
        if not rest or not isinstance(inner, dict):
            mended.pop(str(section), None)
        elif detail["type"] == "missing" and section != "space":
            inner[rest[0]] = STAND_INS[str(section)][rest[0]]
        else:
            inner.pop(rest[0], None)
    for section, stand_in in STAND_INS.items():
        inner = mended.setdefault(section, copy.deepcopy(stand_in))
        if isinstance(inner, dict) and isinstance(stand_in, dict):
            for key, value in stand_in.items():
                inner.setdefault(key, value)
    return mended
