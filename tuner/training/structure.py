"""A base without its weights, and the spec of a sweep held against it: its names, its lengths, how it is stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import SpecError
from tuner.spec.checks.base import problems_of_base, too_long
from tuner.spec.sweep import SweepSpec
from tuner.training.model import load_config, load_model, without_weights
from tuner.training.names import unmatched_names
from tuner.training.sizes import learned_positions, rows_that_do_not_fit


@dataclass(frozen=True)
class Structure:
    """What is known of a base before its weights are loaded."""

    config: Any
    tree: Any
    """The model on the meta device; None where its own code cannot make one there."""

    @property
    def positions(self) -> int | None:
        """See `learned_positions`."""
        return learned_positions(self.tree, self.config) if self.tree is not None else None


def structure_of(spec: SweepSpec, cache: Path) -> Structure:
    """Read a base's config, and make its modules without weights.

    Raises TunerError where it has no config. Whether its files are those of its weights shows when it is loaded; ZeRO-3
    hides a part of that from the workers, so for them it is loaded here, without values.
    """
    model = spec.model.model_dump()
    config = load_config(model, cache)
    if spec.resources.strategy == "zero3":
        load_model(model, cache, "meta")
    try:  # a border: the model's own code
        tree: Any = without_weights(config, spec.model.trust_remote_code)
    except Exception as error:
        print(f"names and sizes are not held against the base: {error}", flush=True)
        tree = None
    return Structure(config, tree)


def refuse_other_structure(spec: SweepSpec, base: Structure) -> None:
    """Raise SpecError for whatever the spec says that is not so with this base."""
    problems = problems_of_base(spec, base.config.to_dict())
    if base.tree is not None:
        problems += [*unmatched_names(spec, base.tree), *too_long(spec, base.positions)]
    _refuse(spec, problems)


def refuse_other_rows(spec: SweepSpec, base: Structure, folders: Iterable[Path], pad_token_id: int | None) -> None:
    """Raise SpecError for tokenised rows that this base cannot take; see `rows_that_do_not_fit`."""
    if base.tree is not None:
        _refuse(spec, rows_that_do_not_fit(base.tree, base.positions, folders, pad_token_id))


def _refuse(spec: SweepSpec, problems: list[Any]) -> None:
    if problems:
        raise SpecError(list(dict.fromkeys(problems)), f"spec, held against {spec.model.name}")
