"""The fields of `train` and `lora`, fixed or searched, against the pinned libraries."""

from __future__ import annotations

from typing import Any, get_args

from tuner.errors import Problem
from tuner.spec.checks.words import any_of, nearest, show
from tuner.spec.fields import Field, all_fields
from tuner.spec.hints import unknown_key
from tuner.spec.policy import OWNED, REFUSED_VALUES, USER
from tuner.spec.space import Choice, Distribution
from tuner.spec.sweep import ModelSpec, SweepSpec

LIBRARY = {"train": "trl.SFTConfig", "lora": "peft.LoraConfig"}


def searchable_fields() -> dict[str, Field]:
    """Every field that a space may name, fixed-only ones included, by dotted key."""
    fields = {key: all_fields()[key] for key in USER}
    for name in ("dtype", "quantization"):
        choices = get_args(ModelSpec.model_fields[name].annotation)
        fields[f"model.{name}"] = Field(f"model.{name}", ("str",), choices)
    fields["model.attn_implementation"] = Field("model.attn_implementation", ("str", "null"))
    return fields


def check_fields(spec: SweepSpec) -> list[Problem]:
    """Find every fixed field that is unknown, not the user's, or of a wrong value."""
    fixed = {f"train.{name}": value for name, value in spec.train.items()}
    fixed |= {f"lora.{name}": value for name, value in (spec.lora or {}).items()}
    found = []
    for key, value in fixed.items():
        problem = not_a_field(key, show(value)) or wrong_value(key, all_fields()[key], value)
        if problem:
            found.append(problem)
    return found


def not_a_field(key: str, got: str, at: str | None = None) -> Problem | None:
    """Return why a `train.` or `lora.` key cannot stand in a spec, or None; `at` is where it stands."""
    at = at or key
    if key in USER:
        return None
    if key in OWNED:
        owned = OWNED[key]
        return Problem(at, got, f"nothing, {owned.reason}", owned.instead)
    section, name = key.split(".", 1)
    names = sorted(other.removeprefix(f"{section}.") for other in USER if other.startswith(f"{section}."))
    return unknown_key(at, f"a field of {LIBRARY[section]}", nearest(name, names), key)


def wrong_value(key: str, field: Field, value: Any, at: str | None = None) -> Problem | None:
    """Return why a field cannot take a value, or None."""
    at = at or key
    refused = REFUSED_VALUES.get((key, str(value)))
    if isinstance(value, str) and value.startswith("pissa_niter_"):
        refused = REFUSED_VALUES["lora.init_lora_weights", "pissa"]
    if refused:
        return Problem(at, show(value), f"{field.allowed}; {refused}")
    if field.accepts(value):
        return None
    if key == "train.packing" and isinstance(value, bool):  # as SFTConfig has it
        return Problem(at, show(value), field.allowed, "bfd" if value else "none")
    return Problem(at, show(value), field.allowed, field.nearest(value))


def possible_values(spec: SweepSpec, key: str) -> list[Any]:
    """Return every value a trial may have for a key; of a range, its two ends; without either, the default."""
    distribution = spec.space.get(key)
    if distribution is not None:
        return ends_or_values(distribution)
    section, name = key.split(".", 1)
    if section == "model":
        return [getattr(spec.model, name)]
    fixed = spec.train if section == "train" else spec.lora or {}
    return [fixed.get(name, all_fields()[key].default)]


def ends_or_values(distribution: Distribution) -> list[Any]:
    """Return the values of a choice, or the ends of a range."""
    return list(distribution.values) if isinstance(distribution, Choice) else [distribution.low, distribution.high]


def place_of(spec: SweepSpec, key: str) -> str:
    """Return where the spec says a key: in the space, or in its section."""
    return f"space.{key}" if key in spec.space else key


def words_for(values: list[Any]) -> str:
    return any_of([show(value) for value in values])
