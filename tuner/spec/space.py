"""The search space: distributions over dotted keys, conditions between them, and how a point becomes a trial."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from tuner.spec.sweep import SweepSpec
    from tuner.spec.trial import TrialConfig

Scalar = bool | int | float | str | None


class _Distribution(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    when: dict[str, list[Scalar]] | None = Field(
        None, description="Search this key only where another choice has one of these values."
    )


class Choice(_Distribution):
    """One of a list of values, unordered."""

    type: Literal["choice"] = Field(description="Which distribution this is.")
    values: list[Scalar] = Field(min_length=1, description="What the key may be.")


class Int(_Distribution):
    """An integer from low to high, both included, in steps, or evenly in its logarithm."""

    type: Literal["int"] = Field(description="Which distribution this is.")
    low: int = Field(description="Smallest value.")
    high: int = Field(description="Largest value, included.")
    step: int = Field(1, ge=1, description="Distance between values.")
    log: bool = Field(False, description="Evenly in the logarithm.")


class Uniform(_Distribution):
    """A real number between low and high; with `step`, a multiple of it above low."""

    type: Literal["uniform"] = Field(description="Which distribution this is.")
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")
    step: float | None = Field(None, gt=0, description="Distance between values; null: any.")


class LogUniform(_Distribution):
    """A positive number, evenly in its logarithm; with `step`, rounded to a multiple of it."""

    type: Literal["log_uniform"] = Field(description="Which distribution this is.")
    low: float = Field(gt=0, description="Smallest value.")
    high: float = Field(gt=0, description="Largest value.")
    step: float | None = Field(None, gt=0, description="Values are rounded to multiples of it; null: any.")


Distribution = Annotated[Choice | Int | Uniform | LogUniform, Field(discriminator="type")]


def is_active(distribution: Distribution, point: Mapping[str, Any]) -> bool:
    """Whether the key is searched, given the values its conditions look at."""
    return all(key in point and point[key] in allowed for key, allowed in (distribution.when or {}).items())


def in_order(space: Mapping[str, Distribution]) -> list[str]:
    """The keys of a space, each after the keys its condition looks at; `tuner.spec.check` refuses cycles."""
    ordered: list[str] = []

    def visit(key: str) -> None:
        if key not in ordered:
            for parent in space[key].when or {}:
                visit(parent)
            ordered.append(key)

    for key in space:
        visit(key)
    return ordered


def resolve(spec: SweepSpec, number: int, point: Mapping[str, Any]) -> TrialConfig:
    """The trial that a point stands for: fixed values, overlaid with searched ones, `alpha_ratio` multiplied out."""
    sections: dict[str, Any] = {
        "model": spec.model.model_dump(),
        "train": copy.deepcopy(spec.train),
        "lora": copy.deepcopy(spec.lora),
    }
    for key, value in point.items():
        section, field = key.split(".", 1)
        sections[section][field] = value
    lora = sections["lora"]
    if lora is not None and "alpha_ratio" in lora:
        alpha = lora.pop("alpha_ratio") * lora.get("r", 8)
        lora["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    return {"number": number, "point": dict(point), **sections}  # type: ignore[typeddict-item]
